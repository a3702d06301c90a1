"""The real DeepSpeed learner on the CPU: ZeRO stages and numbers of workers agree with each other and with plain PyTorch."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import run_ranks
from ranks import SETUPS, batch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.bench.tiny import save_tiny
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.exchange.weights import shapes_in
from spin_ray.learner import attention
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.packing import pack
from spin_ray.learner.proof import EXACT, TOLERANCES
from spin_ray.losses import PairLogps, PairObjective
from spin_ray.records import opponent_reference

STAGES = (0, 2, 3)


def steps_of_ranks(model: Path | str, out: Path, world_size: int, optimizer: str, setups: tuple = STAGES, *, read: bool = True) -> dict[int | str, dict]:
    """Run ranks.py on `world_size` processes under every setup; returns what rank 0 wrote."""
    out.mkdir()
    run_ranks("ranks.py", model, out, optimizer, *setups, world_size=world_size, logs=out)
    return written(out, setups) if read else {}


def written(out: Path, setups: tuple) -> dict[int | str, dict]:
    return {stage: torch.load(out / f"stage_{stage}.pt", weights_only=False) for stage in setups}


@pytest.fixture(scope="module")
def one_worker(tiny_model, tmp_path_factory):
    return steps_of_ranks(tiny_model(tied=True), tmp_path_factory.mktemp("one") / "out", 1, "adamw", (*STAGES, 1, *SETUPS))


@pytest.fixture(scope="module")
def plain_torch(tiny_model):
    """The same three steps with torch.optim, one micro-batch per step, no DeepSpeed."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model(tied=True), dtype=torch.float32, attn_implementation=attention.NAME)
    return *plain_steps(PolicyLogps(lm), list(lm.parameters())), dict(lm.named_parameters())


def plain_steps(policy, parameters):
    """(losses, gradient norms) of the three steps that ranks.py takes, by torch alone."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    losses, norms = [], []
    for step, count in enumerate([9, 8, 1]):
        pairs = batch(step, count)
        packed = pack(pairs, share_prompt=False)
        opponent = torch.tensor(np.array([opponent_reference(p) for p in pairs]), dtype=torch.float32)
        num_tokens = torch.tensor([[len(answer) for answer in p.answers] for p in pairs])
        loss = PairObjective(0.1, nll_weight=0.1)(PairLogps(packed.sums(policy(packed)), opponent, num_tokens))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def deterministic(metrics: dict) -> dict:
    """What does not depend on the machine or on how many ranks share the batch."""
    kept = {name: value for name, value in metrics.items() if name not in ("mfu", "peak_memory_gib", "padding_share", "pack_fill")}
    histogram = kept.pop("margin_histogram")
    return kept | {f"margin_histogram {place}": share for place, share in enumerate(histogram)}


def close(left: dict, right: dict) -> None:
    for ours, theirs in zip(left["steps"], right["steps"], strict=True):
        assert deterministic(ours) == pytest.approx(deterministic(theirs), rel=1e-4, abs=1e-5)
    assert left["weights"].keys() == right["weights"].keys()
    for name, weight in left["weights"].items():
        # Where a gradient is almost 0, Adam makes a whole step of its rounding noise: compare the mean, at 1/1000 of a step.
        assert (weight - right["weights"][name]).abs().mean() < 1e-6, name


def test_steps_are_plain_pytorch_steps(one_worker, plain_torch):
    losses, norms, weights = plain_torch
    for stage in STAGES:
        assert [step["loss"] for step in one_worker[stage]["steps"]] == pytest.approx(losses, rel=1e-4)
        assert [step["grad_norm"] for step in one_worker[stage]["steps"]] == pytest.approx(norms, rel=1e-3)
        for name, weight in one_worker[stage]["weights"].items():
            assert (weight - weights[name].detach()).abs().mean() < 1e-6, name


def check_scores(found: dict) -> None:
    """The frozen copy still scores as theta did before it was trained; the present weights as `token_logps` says."""
    scores, sums = found["scores"], [logps.sum() for logps in found["logps"]]
    assert np.abs(scores["after"] - scores["before"]).max() > 1e-2
    np.testing.assert_allclose(scores["frozen"], scores["before"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores["base"], scores["before"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores["after"][:, :2].sum(-1).reshape(-1), sums, rtol=0, atol=1e-4)
    for together, alone in zip(found["logps"], found["alone"], strict=True):  # what the audit compares, from packed rows
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_references_stay_those_of_the_iteration_s_start(one_worker, stage):
    check_scores(one_worker[stage])


@pytest.mark.parametrize("stage", [*STAGES, *SETUPS])
def test_every_setup_proves_itself_at_the_door(one_worker, stage):
    proof = one_worker[stage]["proof"]
    assert proof.within(TOLERANCES[torch.bfloat16] if stage == "bfloat16" else EXACT) and proof.num_tokens > 40
    assert bool(proof.parameter) == (stage not in (3, "offload_3"))  # a model in shards has no gradients there


@pytest.mark.parametrize("setup", [*STAGES, *SETUPS])
def test_a_player_that_takes_up_its_first_weights_again_trains_as_it_did(one_worker, setup):
    for first, again in zip(one_worker[setup]["steps"], one_worker[setup]["again"], strict=True):
        assert deterministic(again) == pytest.approx(deterministic(first), rel=1e-6, abs=1e-7)


def check_afresh(result):
    """An iteration after another trains as it would in a process of its own: with nothing of the last one's moments and counts."""
    for goes_on, anew in zip(result["afresh"]["goes on"], result["afresh"]["anew"], strict=True):
        assert deterministic(goes_on) == pytest.approx(deterministic(anew), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("setup", [setup for setup in [*STAGES, *SETUPS] if setup != "bfloat16"])
def test_every_iteration_begins_afresh(one_worker, setup):
    check_afresh(one_worker[setup])


def test_zero_stages_agree(one_worker):
    close(one_worker[0], one_worker[2])
    close(one_worker[0], one_worker[1])
    close(one_worker[0], one_worker[3])


def test_checkpoints_that_would_run_code_are_refused(one_worker):
    assert all(result["refuses_code"] for result in one_worker.values())


@pytest.mark.parametrize("setup", ["offload_2", "offload_3", "checkpointed"])
def test_offloading_and_checkpointing_change_no_number(one_worker, setup):
    close(one_worker[0], one_worker[setup])


def test_bfloat16_trains_float32_masters(one_worker):
    exact, rounded = one_worker[0], one_worker["bfloat16"]
    assert [step["loss"] for step in rounded["steps"]] == pytest.approx([step["loss"] for step in exact["steps"]], rel=0.05)
    assert all(weight.dtype == torch.bfloat16 for weight in rounded["weights"].values())


@pytest.mark.parametrize("stage", [*STAGES, "bfloat16"])
def test_a_checkpoint_that_cannot_be_loaded_is_named_in_one_line(one_worker, stage):
    complaints = one_worker[stage]["complaints"]
    assert len(complaints) >= 3
    for complaint in complaints:
        assert f"checkpoint_{stage}: " in complaint and "put it back" in complaint and "\n" not in complaint, complaint


def test_every_step_says_how_it_used_the_hardware(one_worker):
    for stage in STAGES:
        for metrics in one_worker[stage]["steps"]:
            assert 0 < metrics["mfu"] < 1 and 0.1 < metrics["peak_memory_gib"] < 10
            assert metrics["padding_share"] == 0 and 0 < metrics["pack_fill"] <= 1.5


def test_families_that_the_learner_would_get_wrong_are_refused():
    from transformers import FalconConfig, Gemma2Config, LlamaConfig, MambaConfig

    from spin_ray.model import refuse_unsupported

    for config in (LlamaConfig(), Gemma2Config()):
        refuse_unsupported(config, "supported")
    for config in (MambaConfig(), FalconConfig()):
        with pytest.raises(BadInput, match=rf"my-model: .*{config.model_type}") as caught:
            refuse_unsupported(config, "my-model")
        assert "\n" not in str(caught.value)


def test_two_workers_equal_one(one_worker, tiny_model, tmp_path):
    two = steps_of_ranks(tiny_model(tied=True), tmp_path / "out", 2, "adamw")
    for stage in STAGES:
        close(one_worker[stage], two[stage])
        check_scores(two[stage])
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"model_{stage}", dtype=torch.float32)
        for name, parameter in exported.named_parameters():
            assert torch.equal(parameter.detach(), two[stage]["weights"][name]), name
        assert two[stage]["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny GLM-4 mixture: experts that are one tensor in memory and four in the folder, and a router with a persistent buffer."""
    folder = tmp_path_factory.mktemp("mixture")
    save_tiny("glm4_moe", folder)
    AutoTokenizer.from_pretrained(resolve("demo:base")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("world_size", "stages"), [(1, (0, 1, 2, 3)), (2, (3,))])
def test_what_leaves_the_learner_has_the_folder_s_names_shapes_and_buffers(mixture, tmp_path, world_size, stages):
    found, source = steps_of_ranks(mixture, tmp_path / "out", world_size, "adamw", stages), shapes_in(mixture)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for stage in stages:
        exported, published = tmp_path / "out" / f"model_{stage}", found[stage]["weights"]
        assert {name: tuple(tensor.shape) for name, tensor in published.items()} == source == shapes_in(exported)
        written, came = load_file(exported / "model.safetensors"), load_file(mixture / "model.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in published.items())
        assert torch.equal(written[bias], came[bias]) and came[bias].abs().max() > 0
        moved = {name for name in source if not torch.equal(written[name], came[name])}
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in moved and "model.layers.1.mlp.experts.0.gate_proj.weight" in moved


FAMILIES = ("gpt2", "gemma2", "phi", "qwen2_5_vl")
"""Other names and shapes than llama's, soft caps and windows, biases, and a composite whose other part is not trained."""


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{family: what steps_of_ranks found} and the models' folder."""
    folder, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("families") / "out"
    for family in FAMILIES:
        save_tiny(family, folder / family)
        AutoTokenizer.from_pretrained(resolve("demo:base")).save_pretrained(folder / family)
    setups = (0, 3, "checkpointed")
    out.mkdir()
    steps_of_ranks(os.pathsep.join(str(folder / family) for family in FAMILIES), out / "all", 1, "adamw", setups, read=False)
    return {family: written(out / "all" / family, setups) for family in FAMILIES}, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_train_alike_sharded_and_checkpointed(families, family):
    results, folder = families
    came = {name: tensor for path in (folder / family).glob("*.safetensors") for name, tensor in load_file(path).items()}
    plain = results[family][0]
    for stage, result in results[family].items():
        assert [deterministic(step) for step in result["steps"]] == [
            pytest.approx(deterministic(step), rel=1e-3, abs=1e-4) for step in plain["steps"]
        ]
        check_scores(result)
        assert result["weights"].keys() == came.keys() and result["proof"].within(EXACT)
        assert bool(result["proof"].parameter) == (stage != 3)
        for name, weight in result["weights"].items():
            seen = "visual" in name
            assert torch.equal(weight, came[name]) == seen, name  # what sees pictures stays as it came


def test_rmsprop_runs_under_every_stage(tiny_model, tmp_path):
    found = steps_of_ranks(tiny_model(tied=False), tmp_path / "out", 1, "rmsprop")
    for stage in (2, 3):
        close(found[0], found[stage])
    assert found[0]["tied"] == {}


def test_moments_in_8_bits_train_as_in_32_under_every_setup(tiny_model, tmp_path):
    model, setups = tiny_model(tied=False), (0, 2, 3, "offload_2", "bfloat16")
    whole, found = (steps_of_ranks(model, tmp_path / name, 1, name, setups) for name in ("adamw", "adamw_8bit"))
    for setup in setups:
        eight, full = found[setup], whole[setup]
        assert [step["loss"] for step in eight["steps"]] == pytest.approx([step["loss"] for step in full["steps"]], rel=0.02)
        assert [step["loss"] for step in eight["again"]] == pytest.approx([step["loss"] for step in eight["steps"]], rel=1e-3)
        moved = sum(float((eight["weights"][name] - full["weights"][name]).abs().max() > 0) for name in full["weights"])
        assert moved  # it is another optimizer
        if setup != "bfloat16":
            check_afresh(eight)
        size = {
            name: sum(path.stat().st_size for path in (tmp_path / name / f"checkpoint_{setup}").rglob("*.pt")) for name in ("adamw", "adamw_8bit")
        }
        assert size["adamw_8bit"] < (0.85 if setup else 1.0) * size["adamw"], setup


def test_pickled_weights_are_never_opened(tiny_model, tmp_path):
    from spin_ray.learner.engine import load_model

    folder = shutil.copytree(tiny_model(tied=True), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="no weights in safetensors can be loaded from there: "):
        load_model(str(folder), dtype=torch.float32)


@pytest.mark.parametrize("lacks, message", [
    ("", "no such folder; every host must have it"), ("config.json", "its config.json cannot be read: "),
    ("model.safetensors", "no weights in safetensors can be loaded from there: .*model.safetensors"),
    ("half of model.safetensors", "no weights in safetensors can be loaded from there: .*not fully covered"),
])
def test_a_folder_that_is_not_whole_on_this_host_is_one_line(tiny_model, tmp_path, lacks, message):
    from spin_ray.learner.engine import load_model

    folder = shutil.copytree(tiny_model(tied=True), tmp_path / "model")
    file = folder / lacks.removeprefix("half of ")
    if lacks.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink() if lacks else shutil.rmtree(folder)
    with pytest.raises(BadInput, match=f"{folder}: {message}"):
        load_model(str(folder), dtype=torch.float32)
