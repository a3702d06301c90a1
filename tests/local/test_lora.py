"""Self-play with a low-rank adapter: the real learner, the real engine, and whole runs."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_learner import plain_steps, steps_of_ranks
from test_run import SMALL, manifest, metrics, spin_ray
from test_sampler import PROMPT, SAMPLED, no_process_group_is_left, transformers_logps  # noqa: F401
from transformers import AutoModelForCausalLM

from spin_ray.config import Config, LoraConfig
from spin_ray.demo import resolve
from spin_ray.errors import EngineFailed
from spin_ray.exchange.adapters import AdapterFiles, read_adapter
from spin_ray.learner.adapter import Adapter, first_adapter
from spin_ray.learner.engine import load_model
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.proof import plain_logps
from spin_ray.nodes import Node
from spin_ray.placement import choose_hardware
from spin_ray.records import Saved, Version
from spin_ray.sampler.engine import OpponentEngine

SETUPS = (0, 1, 2, 3, "bfloat16", "checkpointed")


def adapter_of(folder, to, *, seed=3, size=0.1):
    """An adapter that changes the model of a folder."""
    files = first_adapter(load_model(str(folder), dtype=torch.float32), LoraConfig(rank=8), base=str(folder), seed=seed)
    noise = torch.Generator().manual_seed(seed)
    for name, tensor in files.tensors.items():
        if "lora_B" in name:
            tensor.normal_(0.0, size, generator=noise)
    files.write(to)
    return files


def merged(folder, adapter):
    """transformers' model with the adapter's weights added."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    Adapter(model, adapter)
    return model


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """(model's folder, adapter's folder)"""
    folder, adapter = tiny_model(tied=True), tmp_path_factory.mktemp("lora") / "adapter"
    adapter_of(folder, adapter)
    return folder, adapter


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    return {size: (steps_of_ranks("@".join(map(str, base)), out / str(size), size, "adamw", SETUPS if size == 1 else (0, 2, 3)), out / str(size)) for size in (1, 2)}


def test_the_main_player_trains_the_adapter_as_plain_torch_does(base, ranks):
    folder, adapter = base
    lm = load_model(str(folder), dtype=torch.float32)
    trained = Adapter(lm, adapter)
    losses, _ = plain_steps(PolicyLogps(lm), list(trained.parameters.values()))
    for size, (stages, out) in ranks.items():
        for stage, found in stages.items():
            if stage == "bfloat16":
                continue
            assert [step["loss"] for step in found["steps"]] == pytest.approx(losses, rel=1e-4), (size, stage)
            written = read_adapter(out / f"adapter_{stage}").tensors
            for name, parameter in trained.parameters.items():
                assert torch.allclose(written[name], parameter, atol=2e-5), (size, stage, name)


def test_copies_checkpoints_and_exports_hold_the_adapter_and_leave_the_base_alone(base, ranks):
    folder, adapter = base
    before = load_file(folder / "model.safetensors")
    for size, (stages, out) in ranks.items():
        for stage, found in stages.items():
            scores, close = found["scores"], 0.5 if stage == "bfloat16" else 1e-4
            assert np.array_equal(scores["frozen"], scores["before"]) and np.array_equal(scores["base"], scores["before"]), (size, stage)
            assert np.abs(scores["after"] - scores["before"]).max() > 1e-3
            assert [step["loss"] for step in found["again"]] == pytest.approx([step["loss"] for step in found["steps"]], rel=1e-6)
            checkpoint = sum(path.stat().st_size for path in (out / f"checkpoint_{stage}").rglob("*") if path.is_file())
            exported = load_file(out / f"model_{stage}/model.safetensors")
            assert exported.keys() == before.keys()
            model = merged(folder, out / f"adapter_{stage}")
            plain = AutoModelForCausalLM.from_pretrained(out / f"model_{stage}", dtype=torch.float32)
            with torch.no_grad():
                ids = torch.arange(5, 25)[None]
                assert (model(ids).logits - plain(ids).logits).abs().max() < close, (size, stage)
            if stage != 3:  # DeepSpeed's files of stage 3 hold the engine's own buffers as well
                assert checkpoint < 20 * sum(t.nbytes for t in read_adapter(adapter).tensors.values())


@pytest.fixture(scope="module")
def opponent(base):
    hardware = choose_hardware(Config(), [Node("here", {"CPU": 2})])
    os.environ.update(hardware.sampler_env)
    engine = OpponentEngine(Saved(*map(str, base)), version=Version(0), dtype="float32", max_model_len=64, seed=0, settings=hardware.engine)
    yield engine
    engine.close()


def test_the_engine_plays_with_the_adapter_that_it_has_just_got(base, opponent, tmp_path):
    folder, adapter = base
    opponent.try_reload().result(60)
    for number in range(3):
        if number:
            adapter = tmp_path / str(number)
            files = adapter_of(folder, adapter, seed=number, size=0.2)
            held = {name: tensor.clone() for name, tensor in files.tensors.items()}
            assert opponent.load_adapter(Version(number), lambda files=files: files).result(60) == Version(number)
            assert all(torch.equal(held[name], files.tensors[name]) for name in held)  # vLLM scales its own copy
        model = merged(folder, adapter)
        drawn = [future.result(60) for future in [opponent.sample(Version(number), PROMPT, SAMPLED) for _ in range(8)]]
        scoring = [opponent.score(Version(number), PROMPT, completion.token_ids) for completion in drawn]  # side by side, of other lengths
        for completion, scored in zip(drawn, scoring, strict=True):
            expected = transformers_logps(model, PROMPT, completion.token_ids)
            np.testing.assert_allclose(completion.logps, expected, atol=1e-4)
            np.testing.assert_allclose(scored.result(60), expected, atol=1e-4)


@pytest.mark.parametrize("change, says", [
    (lambda name: None if "layers.1.mlp.up_proj.lora_A" in name else name, "do not both have .*layers.1.mlp.up_proj.lora_A"),
    (lambda name: name.replace("layers.1", "layers.9"), "do not both have .*layers"),
])
def test_an_adapter_that_lacks_a_layer_is_never_played_with(base, change, says):
    hardware = choose_hardware(Config(), [Node("here", {"CPU": 2})])
    os.environ.update(hardware.sampler_env)
    engine = OpponentEngine(Saved(*map(str, base)), version=Version(0), dtype="float32", max_model_len=64, seed=0, settings=hardware.engine)
    files = read_adapter(base[1])
    planted = AdapterFiles(files.config, {new: tensor for name, tensor in files.tensors.items() if (new := change(name))})
    with pytest.raises(EngineFailed, match=says):
        engine.load_adapter(Version(1), lambda: planted).result(60)
    with pytest.raises(EngineFailed):
        engine.score(Version(0), PROMPT, [5, 6]).result(60)
    engine.close()


def test_the_engine_plays_with_any_rank_and_with_layers_of_another(base, tmp_path):
    folder, adapter, noise = base[0], tmp_path / "adapter", torch.Generator().manual_seed(1)
    files = first_adapter(load_model(str(folder), dtype=torch.float32), LoraConfig(rank=4), base=str(folder), seed=1)
    tensors = {}
    for name, tensor in files.tensors.items():
        rank, a = (12 if "q_proj" in name else 4), "lora_A" in name
        tensors[name] = 0.2 * torch.randn((rank, tensor.shape[1]) if a else (tensor.shape[0], rank), generator=noise)
    AdapterFiles({**files.config, "rank_pattern": {"q_proj": 12}}, tensors).write(adapter)
    hardware = choose_hardware(Config(), [Node("here", {"CPU": 2})])
    os.environ.update(hardware.sampler_env)
    engine = OpponentEngine(
        Saved(str(folder), str(adapter)), version=Version(0), dtype="float32", max_model_len=64, seed=0, settings=hardware.engine
    )
    found = engine.score(Version(0), PROMPT, [5, 6, 7]).result(60)
    engine.close()
    with torch.no_grad():
        wanted, plain = (plain_logps(lm, np.array(PROMPT), np.array([5, 6, 7])).numpy() for lm in (
            merged(folder, adapter), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ))
    assert np.abs(found - wanted).max() < 1e-3 < np.abs(plain - wanted).max()


LORA = ["lora.rank=8", "spin.lr=0.003"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = spin_ray("run", "conf/demo.yaml", f"run.dir={runs}", "run.name=lora", *SMALL, *LORA)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return runs / "lora"


def logps_of(model, rows):
    return [transformers_logps(model, row["prompt_ids"], row["real_ids"]) for row in rows]


def test_a_run_s_opponent_is_the_base_with_the_newest_adapter(finished):
    """Every existing script takes the base for the reference of all iterations."""
    firsts = [mark["report"]["first_loss"] for mark in manifest(finished) if mark["stage"] == "iteration"]
    assert firsts == pytest.approx([0.693147] * 2, abs=1e-4) and max(metrics(finished, "audit/max_abs_logp_difference_nats")) < 1e-3
    folder = resolve("demo:sft")
    rows = [row for path in sorted(finished.glob("iter_001/pairs/block_*.parquet")) for row in pq.read_table(path).to_pylist()][:8]
    scored = [np.array(row["opponent_real_logps"]) for row in rows]
    with_adapter = logps_of(merged(folder, finished / "iter_000/adapter"), rows)
    alone = logps_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), rows)
    exported = logps_of(AutoModelForCausalLM.from_pretrained(finished / "iter_000/model", dtype=torch.float32), rows)
    for found, right, whole in zip(scored, with_adapter, exported, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-3)
        np.testing.assert_allclose(found, whole, atol=1e-3)
    assert max(np.abs(found - base).max() for found, base in zip(scored, alone, strict=True)) > 0.02


@pytest.mark.parametrize("scorer", ["frozen", pytest.param("learner", marks=pytest.mark.slow)])
def test_the_learner_s_references_are_the_opponent_s(finished, scorer, tmp_path):
    done = spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=lora", *SMALL, *LORA, f"reference.scorer={scorer}")
    assert done.returncode == 0, done.stderr[-3000:]
    firsts = [mark["report"]["first_loss"] for mark in manifest(tmp_path / "lora") if mark["stage"] == "iteration"]
    assert firsts == pytest.approx([0.693147] * 2, abs=1e-4)


def test_a_run_goes_on_from_its_adapter(finished, tmp_path):
    """Killed after iteration 0 was durable."""
    run = tmp_path / "lora"
    shutil.copytree(finished, run)
    lines = (run / "manifest.jsonl").read_text().splitlines(keepends=True)
    last = next(place for place, line in enumerate(lines) if '"iteration": 1' in line and '"stage": "iteration"' in line)
    (run / "manifest.jsonl").write_text("".join(lines[:last]))
    shutil.rmtree(run / "iter_001")
    done = spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=lora", *SMALL, *LORA)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [mark["iteration"] for mark in manifest(run) if mark["stage"] == "iteration"] == [0, 1]
    assert manifest(run)[-1]["stage"] == "finished"
    again = [mark["report"]["first_loss"] for mark in manifest(run) if mark["stage"] == "iteration"]
    assert again == pytest.approx([0.693147] * 2, abs=1e-4)
    assert read_adapter(run / "iter_001/adapter").tensors.keys() == read_adapter(finished / "iter_001/adapter").tensors.keys()


@pytest.mark.slow
def test_merged_weights_may_travel_instead_and_an_adapter_may_be_where_a_run_begins(finished, tmp_path):
    done = spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=merged", *SMALL, *LORA, "lora.sync=merged", "spin.num_iterations=1")
    assert done.returncode == 0, done.stderr[-3000:]
    further = ["spin.num_iterations=1", f"model.adapter={finished}/iter_001/adapter", "lora.export_merged=false"]
    done = spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=further", *SMALL, *LORA, *further)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "further/iter_000/model").exists() and (tmp_path / "further/iter_000/adapter/adapter_config.json").exists()
    nll = [mark["metrics"]["real_nll_nats_per_token"] for mark in manifest(finished) if mark["stage"] == "evaluation"][-1]
    first = next(mark["metrics"]["real_nll_nats_per_token"] for mark in manifest(tmp_path / "further") if mark["stage"] == "evaluation")
    assert first == pytest.approx(nll, abs=1e-4)
    done = spin_ray("eval", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=eval", "data.max_eval_prompts=24", further[1], "lora.rank=8")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["real_nll_nats_per_token"] == pytest.approx(nll, abs=1e-4)
    refused = spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=no", *SMALL, further[1])
    assert refused.returncode == 2 and "has rank 8, and lora.rank=0: set lora.rank=8 to train it on" in refused.stderr
