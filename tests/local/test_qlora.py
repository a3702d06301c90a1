"""A base in 4 bits under an adapter: the same one for both players."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_lora import LORA, logps_of, merged
from test_run import SMALL, manifest, metrics, spin_ray
from transformers import AutoModelForCausalLM

from spin_ray.demo import resolve
from spin_ray.learner.adapter import linear_layers
from spin_ray.learner.base import write_base
from spin_ray.learner.engine import load_model
from spin_ray.learner.quantized import plain, quantize, true_shape

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_base_that_is_quantised_again_stays_what_it_is(tiny_model, tmp_path, dtype, stored):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_model(tied=True), dtype=stored).save_pretrained(source)
    write_base(str(source), tmp_path / "base", dtype=str(dtype).removeprefix("torch."), trust_remote_code=False)
    before, written = load_file(source / "model.safetensors"), load_file(tmp_path / "base/model.safetensors")
    lm = load_model(str(tmp_path / "base"), dtype=dtype)
    layers = {f"{name}.weight" for name in linear_layers(lm)}
    quantize(lm, linear_layers(lm), CPU)
    assert before.keys() == written.keys() and layers and all(written[name].dtype == dtype for name in written)
    for name, parameter in lm.named_parameters():
        assert true_shape(parameter) == before[name].shape and torch.equal(plain(parameter), written[name]), name
        assert torch.equal(before[name].to(dtype), written[name]) == (name not in layers), name
        assert name not in layers or parameter.numel() * parameter.element_size() == before[name].numel() / 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = spin_ray("run", "conf/demo.yaml", f"run.dir={runs}", "run.name=qlora", *SMALL, *LORA, "model.quantization=nf4")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return runs / "qlora"


def test_both_players_play_with_the_base_that_the_bits_stand_for(finished):
    firsts = [mark["report"]["first_loss"] for mark in manifest(finished) if mark["stage"] == "iteration"]
    assert firsts == pytest.approx([0.693147] * 2, abs=1e-4) and max(metrics(finished, "audit/max_abs_logp_difference_nats")) < 1e-3
    rows = [row for path in sorted(finished.glob("iter_001/pairs/block_*.parquet")) for row in pq.read_table(path).to_pylist()][:8]
    right = logps_of(merged(finished / "start/base", finished / "iter_000/adapter"), rows)
    exported = logps_of(AutoModelForCausalLM.from_pretrained(finished / "iter_000/model", dtype=torch.float32), rows)
    unquantised = logps_of(merged(resolve("demo:sft"), finished / "iter_000/adapter"), rows)
    for one, other in zip(right, exported, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert max(np.abs(one - other).max() for one, other in zip(right, unquantised, strict=True)) > 0.05
    assert all(row["opponent_generated_logps"] == [] for row in rows)  # the learner scores: reference.scorer=auto


@pytest.mark.parametrize("settings, says", [
    (["model.quantization=nf4"], "model.quantization=nf4 needs lora.rank"),
    (["model.quantization=nf4", *LORA, "learner.zero_stage=3"], "does not go with learner.zero_stage=3"),
])
def test_what_cannot_be_is_refused(settings, says, tmp_path):
    done = spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", *settings)
    assert done.returncode == 2 and says in done.stderr
