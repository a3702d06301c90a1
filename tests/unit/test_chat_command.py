"""`spin-ray chat`: which version answers, that it answers as transformers does, and that its text does not act on the terminal."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import made
from pyarrow.fs import FileSystem, LocalFileSystem, copy_files
from rich.cells import cell_len
from rich.console import Console
from seen_runs import MadeRun, config_of, half_way
from transformers import AutoModelForCausalLM

from spin_ray.chat import ChatFormat
from spin_ray.config import to_json
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.learner.loading import load_model
from spin_ray.look import stored as stored_module
from spin_ray.look.answers import Drawing, Talker, _Stream, load
from spin_ray.look.chat import Dialogue
from spin_ray.look.printable import printable
from spin_ray.look.screens import Beside, Lines
from spin_ray.look.versions import choose
from spin_ray.theta import new_adapter_of

ROOT = Path(__file__).parents[2]
QUESTIONS = ["Count the tools: mouse, knife, grey, axe, file?", "Read this list from the end: yellow, fig, saw.", "Say hello"]
GREEDY = Drawing(24, 0.0)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def sft() -> Talker:
    return load(choose("demo:sft", iteration=None, compare=False)[0])


def a_run(folder: Path, *, finished: int = 2, **changes) -> MadeRun:
    """A run whose versions are real models: theta_0 is demo:sft, the others demo:base."""
    run = half_way(folder, finished=finished)
    for t in range(finished):
        shutil.rmtree(folder / f"iter_{t:03d}/model")
        shutil.copytree(resolve("demo:base"), folder / f"iter_{t:03d}/model")
    config = config_of(folder)
    for section, values in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    (folder / "config.json").write_text(to_json(config))
    return run


def changing_adapter(folder: Path, *, seed: int) -> None:
    from spin_ray.config import LoraConfig

    files = new_adapter_of(resolve("demo:sft"), LoraConfig(rank=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.3 if "lora_B" in name else t for name, t in files.tensors.items()}
    dataclasses.replace(files, tensors=tensors).write(folder)


# Which version.


@settings(max_examples=30, deadline=None)
@given(finished=st.integers(0, 3), best=st.one_of(st.none(), st.integers(0, 3)), asked=st.one_of(st.none(), st.integers(-1, 4)), compare=st.booleans())
def test_which_version_answers(tmp_path_factory, finished, best, asked, compare):
    run = half_way(tmp_path_factory.mktemp("made") / "run", finished=finished)
    best = None if best is None else min(best, finished)
    if best is not None:
        (run.folder / "best").write_text(f"/moved/since/run/iter_{best - 1:03d}/model\n" if best else "demo:sft\n")
    wanted = asked if asked is not None else best if best is not None else finished
    if not 0 <= wanted <= finished or (compare and wanted == 0):
        with pytest.raises(BadInput, match="theta_"):
            choose(str(run.folder), iteration=asked, compare=compare)
        return
    chosen = choose(str(run.folder), iteration=asked, compare=compare)
    assert [one.name for one in chosen] == ([f"theta_{t}" for t in (0, wanted)] if compare else [f"theta_{wanted}"])
    assert chosen[-1].saved.model == (str(run.folder / f"iter_{wanted - 1:03d}/model") if wanted else resolve("demo:sft"))


def test_what_is_not_there_is_one_line(tmp_path):
    run = a_run(tmp_path / "run")
    shutil.rmtree(run.folder / "iter_000/model")
    for where, options, line in (
        (run.folder, {"iteration": 1, "compare": False}, "iter_000/model: the folder of theta_1 is gone"),
        (run.folder, {"iteration": 7, "compare": False}, "no theta_7; it has theta_0 to theta_2"),
        ("demo:sft", {"iteration": 1, "compare": False}, "a model alone has no iterations"),
        ("demo:sft", {"iteration": None, "compare": True}, "a model alone has no iterations"),
        (tmp_path, {"iteration": None, "compare": False}, "no run's folder"),
    ):
        with pytest.raises(BadInput, match=line):
            choose(str(where), **options)


# What it answers.


@pytest.mark.parametrize("turns", [QUESTIONS[:1], QUESTIONS[1:2], QUESTIONS])
def test_greedy_answers_are_transformers_own(sft, turns):
    lm = AutoModelForCausalLM.from_pretrained(resolve("demo:sft"), dtype=torch.float32)
    sft.history.clear()
    messages = []
    for text in turns:
        messages.append({"role": "user", "content": text})
        prompt, _ = sft.chat.encode(messages, "yes")  # the ids that training would have before an answer
        ids = torch.tensor([prompt])
        made_ids = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=sorted(sft.chat.stop_ids), pad_token_id=0)
        right = sft.chat.decode(made_ids[0, ids.shape[1] :].tolist())
        assert sft.answer(text, "", GREEDY, quiet) == right and right
        messages.append({"role": "assistant", "content": right})
    assert sft.history == messages


def test_a_seed_draws_the_same_again(sft):
    def drawn(seed: int | None) -> str:
        sft.history.clear()
        return sft.answer("Say hello", "", Drawing(12, 2.0, seed), quiet)

    assert drawn(3) == drawn(3) and len({drawn(seed) for seed in range(4)}) > 1 and len({drawn(None) for _ in range(4)}) > 1


def test_an_adapter_over_a_base_and_a_quantised_base(tmp_path):
    run = a_run(tmp_path / "run", lora={"rank": 4})
    changing_adapter(run.folder / "start/adapter", seed=0)
    changing_adapter(run.folder / "iter_001/adapter", seed=1)
    shutil.rmtree(run.folder / "iter_001/model")
    talker = load(choose(str(run.folder), iteration=2, compare=False)[0])
    name = "model.layers.0.self_attn.q_proj"
    plain = load_model(resolve("demo:sft"), attention=None, dtype=torch.float32).get_submodule(name).weight
    from safetensors.torch import load_file

    tensors = load_file(run.folder / "iter_001/adapter/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    scale = json.loads((run.folder / "iter_001/adapter/adapter_config.json").read_text())["lora_alpha"] / 4
    x = torch.randn(1, plain.shape[1])
    torch.testing.assert_close(talker.lm.get_submodule(name)(x), x @ (plain + scale * b @ a).T, rtol=1e-4, atol=1e-4)
    zero, two = (load(one) for one in choose(str(run.folder), iteration=2, compare=True))
    assert zero.name == "theta_0" and not torch.equal(zero.lm.get_submodule(name)(x), two.lm.get_submodule(name)(x))

    quantised = a_run(tmp_path / "q/run", lora={"rank": 4}, model={"quantization": "nf4"})
    shutil.copytree(resolve("demo:base"), quantised.folder / "start/base")
    changing_adapter(quantised.folder / "iter_001/adapter", seed=1)
    [chosen] = choose(str(quantised.folder), iteration=2, compare=False)
    assert chosen.saved.model == str(quantised.folder / "start/base") and load(chosen).answer("Say hello", "", GREEDY, quiet) is not None
    [alone] = choose(str(run.folder / "iter_001/adapter"), iteration=None, compare=False)  # an adapter's folder names its base
    assert alone.saved == dataclasses.replace(alone.saved, model=resolve("demo:sft"), adapter=str(run.folder / "iter_001/adapter"))


def test_a_run_on_an_object_store(tmp_path, object_store, monkeypatch):
    monkeypatch.setattr(stored_module, "SCRATCH", str(tmp_path / "look"))
    run = a_run(tmp_path / "run", finished=1)
    url = object_store % uuid.uuid4().hex
    store, base = FileSystem.from_uri(url)
    copy_files(str(run.folder), f"{base}/run", source_filesystem=LocalFileSystem(), destination_filesystem=store)
    where, _, query = url.partition("?")
    far, near = (load(choose(place, iteration=1, compare=False)[0]) for place in (f"{where}/run?{query}", str(run.folder)))
    assert far.answer(QUESTIONS[0], "", GREEDY, quiet) == near.answer(QUESTIONS[0], "", GREEDY, quiet)
    store.delete_dir(f"{base}/run/iter_000/model")
    with pytest.raises(BadInput, match=f"{where}/run/iter_000/model: the folder of theta_1 is gone"):
        choose(f"{where}/run?{query}", iteration=1, compare=False)


def test_a_dialogue_that_is_too_long_or_refused_is_not_remembered(sft):
    sft.history.clear()
    with pytest.raises(BadInput, match="the model has 256 positions"):
        sft.answer("mouse " * 300, "", GREEDY, quiet)
    assert sft.history == []
    [cut] = [Talker(sft.name, sft.lm, sft.chat, 40)]
    assert len(cut.chat.tokenizer(cut.answer(QUESTIONS[1], "", Drawing(500, 0.0), quiet))["input_ids"]) < 40


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(sft):
    sft.history.clear()
    heard, said = [], []

    def hear(place: int, new: str) -> None:
        heard.append(new)
        if len(heard) == 2:
            raise KeyboardInterrupt

    class Screen:
        def answering(self):
            import contextlib
            return contextlib.nullcontext(hear)

    dialogue = Dialogue([sft], Screen(), GREEDY, "", said.append)
    assert dialogue.hear(QUESTIONS[0]) and said == ["stopped"]
    assert [message["role"] for message in sft.history] == ["user", "assistant"] and sft.history[1]["content"].startswith("".join(heard))
    assert dialogue.hear("/reset") and sft.history == [] and "forgotten" in said[-1]
    assert dialogue.hear("/system Be short") and dialogue.system == "Be short" and dialogue.hear("") and dialogue.hear("/help")
    assert not dialogue.hear("/quit")


# What the terminal gets.

WILD = st.text(st.characters(codec="utf-8", categories=None) | st.sampled_from("\x1b\x9b\r\b\x07\x00\u202e\u2066[]\\"), max_size=60)


@given(WILD)
def test_printable_text_cannot_act(text):
    shown = printable(text)
    assert all(sign in "\n\t" or unicodedata.category(sign) not in ("Cc", "Cs") for sign in shown) and "\u202e" not in shown
    assert printable(shown) == shown and [s for s in shown if s.isalnum()] == [s for s in text if s.isalnum()]


class Named:
    def __init__(self, name: str):
        self.name = name


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(WILD, min_size=2, max_size=2), width=st.integers(20, 120))
def test_side_by_side_nothing_is_lost_and_no_markup_acts(texts, width):
    texts = [printable(f"[red]{text}[/red]\n") for text in texts]
    file = io.StringIO()
    console = Console(file=file, width=width, height=30, highlight=False, emoji=False)
    with Beside([Named("theta_0"), Named("theta_1")], console).answering() as hear:
        for place, text in enumerate(texts):
            for sign in text:
                hear(place, sign)
    shown = file.getvalue()
    assert "\x1b" not in shown and max(map(cell_len, shown.splitlines())) <= width
    letters = sorted(sign for sign in "".join(texts) if sign.isascii() and sign.isalnum())
    assert sorted(sign for sign in shown if sign.isascii() and sign.isalnum()) == sorted([*letters, *"theta0theta1"])


def test_lines_of_one_and_of_two(capsys):
    for talkers, expected in (([Named("a")], "one\n"), ([Named("a"), Named("b")], "a: one\nb: two\n")):
        with Lines(talkers).answering() as hear:
            for place, text in enumerate(["one", "two"][: len(talkers)]):
                hear(place, text[:1])
                hear(place, text[1:])
        assert capsys.readouterr().out == expected


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 400), max_size=30), st.text("añ你🙂 ", max_size=20))
def test_a_stream_is_the_whole_text(ids, text):
    chat = ChatFormat(made("byte level", TEMPLATE))
    ids = [*(i for i in ids if i < len(chat.tokenizer)), *chat.tokenizer(text, add_special_tokens=False)["input_ids"]]
    heard: list[str] = []
    stream = _Stream(chat, heard.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for i in ids:
        stream.put(torch.tensor([i]))
    stream.end()
    stream.end()
    assert "".join(heard) == printable(chat.decode(ids))


def test_from_a_pipe(tmp_path):
    run = a_run(tmp_path / "run", finished=1)
    run.evaluate(1)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = f"{QUESTIONS[0]}\n\n/reset\n{QUESTIONS[1]}\n"
    asked = subprocess.run(
        [sys.executable, "-m", "spin_ray", "chat", str(run.folder), "--compare", "--max-new-tokens", "24"], input=lines, env=env, capture_output=True, text=True,
    )
    assert asked.returncode == 0, asked.stderr
    told = asked.stdout.splitlines()
    assert [line[:8] for line in told] == ["theta_0:", "theta_1:"] * 2 and told[0] == "theta_0: There are three."
    assert all(line.startswith("spin-ray: ") for line in asked.stderr.splitlines())
    refused = subprocess.run([sys.executable, "-m", "spin_ray", "chat", "demo:sft", "--temperature", "-1"], env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "--temperature -1" in refused.stderr
