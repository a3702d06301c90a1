"""Tasks of lm-evaluation-harness, before any engine is there: what is asked of samplers, and what the door refuses."""

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from made_tasks import make_tasks

from spin_ray.config import differences, load_config, to_json
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.model import inspect_model
from spin_ray.records import Version
from spin_ray.sampler.fake import FakeSampler
from spin_ray.tasks.asking import AHEAD, PART, in_order
from spin_ray.tasks.harness import load_tasks
from spin_ray.tasks.model import SamplerModel

DEMO = ["model.path=demo:sft", "data.train=demo:train"]


class OneFake:
    """Answers by one FakeSampler, and what it was asked."""

    def __init__(self):
        self._sampler, self.asked = FakeSampler(Version(0)), []

    def likelihood(self, pairs):
        self.asked += (pairs := list(pairs))
        return asyncio.run(self._sampler.likelihood(Version(0), *map(list, zip(*pairs, strict=True))))

    def sample(self, prompts, settings):
        self.asked += (prompts := [(prompt, settings) for prompt in prompts])
        return asyncio.run(self._sampler.sample(Version(0), [prompt for prompt, _ in prompts], settings))


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return inspect_model(config(tmp_path_factory.mktemp("config")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tasks(tmp_path_factory.mktemp("tasks"), docs=6)


def config(tmp_path, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    return load_config(path, [*DEMO, *overrides])[0]


def loaded(facts, tmp_path, *overrides):
    said = []
    return load_tasks(config(tmp_path, *overrides).eval, facts, said.append), said


def requests(kind, *arguments):
    return [Instance(kind, {}, args, 0, ("task", number, 1)) for number, args in enumerate(arguments)]


def test_a_continuation_behind_a_text_and_behind_none(facts):
    model, fake = SamplerModel(facts.chat, 100, answers := OneFake()), FakeSampler(Version(0))
    found = model.loglikelihood(requests("loglikelihood", ("mouse, goat,", " lion"), ("", "lion"), ("mouse ", "goat")))
    texts = [(facts.chat.tokenizer.decode(text), facts.chat.tokenizer.decode(continuation)) for text, continuation in answers.asked]
    assert texts == [("mouse, goat,", " lion"), ("<|end|>", "lion"), ("mouse", " goat")]  # the end token stands for nothing; blanks go over
    assert [logp for logp, _ in found] == [-float(len(continuation)) for _, continuation in answers.asked]
    drawn = fake._completion(answers.asked[0][0], model._settings({"max_gen_toks": 1})).token_ids
    assert [each.greedy for each in answers.likelihood([(answers.asked[0][0], drawn), (answers.asked[0][0], drawn + 1)])] == [True, False]
    with pytest.raises(BadInput, match="has no token of its own"):
        model.loglikelihood(requests("loglikelihood", ("mouse", "")))


@given(length=st.integers(1, 40), answer=st.integers(1, 12), max_length=st.integers(12, 60))
def test_what_is_too_long_loses_its_begin_and_is_counted(facts, length, answer, max_length):
    model = SamplerModel(facts.chat, max_length, answers := OneFake())
    whole, continuation = list(range(10, 10 + length)), list(range(100, 100 + answer))
    model._loglikelihood_tokens([(None, whole, continuation)])
    [(text, given)] = answers.asked
    assert given.tolist() == continuation and len(text) + len(given) <= max_length + 1
    assert model.num_truncated == (length + answer > max_length + 1)
    assert text.tolist() == whole[-len(text) :] and (model.num_truncated or len(text) == length)


@given(words=st.integers(1, 60), max_length=st.integers(2, 30))
def test_every_token_of_a_text_is_predicted_once(facts, words, max_length):
    model = SamplerModel(facts.chat, max_length, answers := OneFake())
    text = " ".join(["mouse", "goat", "lion"][k % 3] for k in range(words))
    ids = model.tok_encode(text)
    [logp] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert logp == -len(ids) and [int(i) for _, predicted in answers.asked for i in predicted] == ids
    assert all(len(before) + len(predicted) <= max_length + 1 for before, predicted in answers.asked)
    assert model.num_windowed == (len(ids) > max_length) and model.num_truncated == 0


def test_how_answers_are_drawn(facts):
    model = SamplerModel(facts.chat, 40, answers := OneFake())
    greedy, drawn = {"until": ["\n", "Q:"], "max_gen_toks": 8, "do_sample": False}, {"until": ".", "temperature": 0.5, "do_sample": True, "top_p": 0.9}
    texts = model.generate_until(requests("generate_until", ("mouse", greedy), ("goat " * 50, greedy)))
    (first, settings), (second, _) = answers.asked
    assert (settings.temperature, settings.max_new_tokens, settings.stop_texts, settings.stop_ids) == (0.0, 8, ("\n", "Q:"), (1,))
    assert len(first) == 1 and len(second) == 40 - 8 and model.num_truncated == 1
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    sampled = model._settings(drawn)
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens, sampled.stop_texts) == (0.5, 0.9, 256, (".",))
    with pytest.raises(BadInput, match="generation_kwargs has num_beams; the samplers take"):
        model._settings({"num_beams": 4})


@given(st.integers(0, 3 * PART))
def test_answers_come_back_in_order(count):
    assert in_order(range(count), lambda part: part, lambda part: [-item for item in part]) == [-item for item in range(count)]


def test_only_so_many_requests_are_under_way():
    under_way, most = 0, 0

    def ask(part):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        return part

    def result(part):
        nonlocal under_way
        under_way -= 1
        return part

    assert len(in_order(range(PART * (AHEAD + 5)), ask, result)) == PART * (AHEAD + 5)
    assert (most, under_way) == (AHEAD, 0)


def test_versions_are_asked_the_same_one_after_the_other(facts, folder, tmp_path):
    tasks, said = loaded(facts, tmp_path, f"eval.tasks=[{folder}]", "eval.limit=4")
    first, again = (tasks.ask(OneFake()) for _ in range(2))
    assert first == again and said == [] and first.heads == ("made", "made_texts")
    assert first.tasks["made_choice"]["num_docs"] == 4 and first.num_truncated == first.num_windowed == 0
    assert {"made_acc", "made_acc_se", "made_texts_word_perplexity", "num_truncated"} <= first.metrics().keys()
    assert "made_choice_acc" not in first.metrics() and "made acc 0." in first.line()
    assert json.loads(json.dumps(first.as_json()))["harness"] == "0.4.13"
    assert tasks.max_model_len == tasks.max_length + 2 and len(tasks.examples(3)) == 3


def test_shots_are_the_entrys_the_keys_or_the_tasks_own(facts, folder, tmp_path):
    given = f"eval.tasks=[made_choice:2,{folder / 'answers.yaml'}]", f"eval.include_path={folder}"
    tasks, _ = loaded(facts, tmp_path, *given, "eval.num_fewshot=1")
    assert tasks.ask(OneFake()).num_fewshot == {"made_choice": 2, "made_answers": 1}
    (folder / "none.yaml").write_text((folder / "choice.yaml").read_text().replace("made_choice", "made_bare") + "num_fewshot: 0\n")
    tasks, said = loaded(facts, tmp_path, f"eval.tasks=[{folder / 'none.yaml'}:3]")
    assert tasks.ask(OneFake()).num_fewshot == {"made_bare": 0} and "made for no examples" in said[0]
    (folder / "none.yaml").unlink()


def test_data_files_lie_beside_the_task_or_where_one_is(facts, folder, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "choice.yaml").write_text((folder / "choice.yaml").read_text())
    with pytest.raises(BadInput, match=r"choice\.yaml: data file choice\.jsonl is neither in the file's folder nor in the working directory"):
        loaded(facts, tmp_path, f"eval.tasks=[{moved / 'choice.yaml'}]")
    monkeypatch.chdir(folder)
    assert loaded(facts, tmp_path, f"eval.tasks=[{moved / 'choice.yaml'}]")[0].ask(OneFake()).heads == ("made_choice",)


NO_HUB = "task: far\ndataset_path: nobody/has_this\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_target: 0\n"


@pytest.mark.parametrize("task, text, message", [
    ("arc_chalenge:25", "", r"eval\.tasks=arc_chalenge: lm-evaluation-harness has no such task, .* the nearest name is arc_challenge"),
    ("{here}/none.yaml", "", r"none\.yaml: no such file or folder \(working directory: "),
    ("{here}", "", r"no \*\.yaml files in this folder"),
    ("{here}/t.yaml", "task: [", r"t\.yaml: not a task of lm-evaluation-harness: "),
    ("{here}/t.yaml", NO_HUB, r"t\.yaml: cannot be loaded: .*; a data set of the hub needs the network once"),
    ("{made}/beams.yaml", "num_beams: 3,", r"made_answers: generation_kwargs has num_beams"),
    ("{made}/code.yaml", "unsafe", r"made_answers runs code that the model writes"),
    ("{made}/template.yaml", "template", r"template\.yaml: cannot be loaded: UndefinedError: 'str object' has no attribute 'nothing'$"),
    ("{made}/late.yaml", "late", r"made_choice: its requests cannot be made: "),
    ("{made}/choice.yaml,{made}/group.yaml", "", r"eval\.tasks has made_choice twice"),
])
def test_what_the_door_refuses_in_one_line(facts, folder, tmp_path, task, text, message):
    answers, choice = (folder / "answers.yaml").read_text(), (folder / "choice.yaml").read_text()
    first = json.loads((folder / "choice.jsonl").read_text().splitlines()[0])["question"]
    made = {
        "beams.yaml": answers.replace("until:", f"{text} until:"), "code.yaml": f"{answers}unsafe_code: true\n",
        "template.yaml": choice.replace("{{question}}", "{{question.nothing.there}}"),
        "late.yaml": choice.replace("{{question}}", f"{{{{question if question == '{first}' else question.nothing.there}}}}"),
    }
    name = task.rpartition("/")[2]
    if name in made:
        (folder / name).write_text(made[name])
    elif text:
        (tmp_path / "t.yaml").write_text(text)
    given = task.format(here=tmp_path, made=folder)
    with pytest.raises(BadInput, match=message) as refused:
        configured = config(tmp_path if text or name != "{here}" else folder, f"eval.tasks=[{given}]", f"eval.include_path={folder}")
        load_tasks(configured.eval, facts, print)
    assert "\n" not in str(refused.value)
    for made_file in made:
        (folder / made_file).unlink(missing_ok=True)


@pytest.mark.parametrize("key, message", [
    ("eval.max_length=300", r"eval\.max_length=300: the model takes at most 254 tokens here"),
    ("eval.max_length=20", r"made_answers has an answer of up to 25 tokens, and 20 can be read"),
])
def test_lengths_that_do_not_fit(facts, folder, tmp_path, key, message):
    with pytest.raises(BadInput, match=message):
        loaded(facts, tmp_path, f"eval.tasks=[{folder / 'answers.yaml'}]", key)


def test_what_is_cut_is_told_before_anything_starts(facts, folder, tmp_path):
    tasks, said = loaded(facts, tmp_path, f"eval.tasks=[{folder / 'choice.yaml'}:3]", "eval.max_length=30")
    assert "18 of 18 requests of made_choice are longer than the 30 tokens that are read" in said[0]
    assert tasks.ask(OneFake()).num_truncated == 18


def test_a_run_may_go_on_with_other_tasks_but_not_with_one_named_twice(tmp_path):
    one = config(tmp_path, "eval.tasks=[gsm8k:5]")
    assert one.eval.wanted == [("gsm8k", 5)] and differences(config(tmp_path), json.loads(to_json(one))) == []
    with pytest.raises(BadInput, match=r"eval\.tasks=gsm8k:5: named twice"):
        config(tmp_path, "eval.tasks=[gsm8k:5,gsm8k]")


def test_who_asks_for_no_tasks_does_not_load_the_harness():
    code = "import sys, spin_ray.selfplay; print([name for name in sys.modules if name.startswith('lm_eval')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_tokens_stay_the_tokenizers_own(facts):
    model = SamplerModel(facts.chat)
    told = model.apply_chat_template([{"role": "user", "content": "mouse"}])
    assert told == "<|user|>mouse<|end|><|assistant|>" and model.tok_encode(told) == facts.chat.tokenizer.encode(told)
    assert model.tokenizer_name and resolve("demo:sft") == facts.path and isinstance(model._prompt("")[0], int) and np.int32
