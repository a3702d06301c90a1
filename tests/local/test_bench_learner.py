"""The learner bench runs end to end on a tiny model, and needs neither ray nor vllm."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from spin_ray.__main__ import main
from spin_ray.bench import memory

pytestmark = pytest.mark.slow

KEYS = {
    "ours_pairs_per_s", "trl_pairs_per_s", "ratio", "trl_best_pairs_per_s", "ratio_best", "naive_pairs_per_s", "ratio_naive",
    "ours_peak_gib", "trl_peak_gib", "memory_ratio", "loss_difference",
}


def test_all_contestants_train_to_the_same_loss(capfd):
    assert main(["bench", "learner", "--model", "tiny", "--steps", "1", "--batch-pairs", "8"]) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(last) == KEYS and all(value >= 0 for value in last.values())
    assert last["loss_difference"] < 1e-4


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3.2-1b", "zephyr-7b"])
def test_shapes_of_the_gpu_bench_in_small(shape, tmp_path):
    """The three architectures through our packed forward pass and through transformers: the same log-probs."""
    from transformers import AutoModelForCausalLM

    from spin_ray.bench import workload
    from spin_ray.learner import attention
    from spin_ray.learner.logps import PolicyLogps
    from spin_ray.learner.packing import pack

    small = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8}
    workload.save_model(tmp_path / "model", shape, **small)
    pairs = workload.random_pairs(3, vocab_size=101, lengths=workload.Lengths(longest=20))
    workload.save_pairs(tmp_path / "pairs.parquet", workload.with_references(pairs, tmp_path / "model", device="cpu"))
    known = [logps for p in workload.load_pairs(tmp_path / "pairs.parquet") for logps in (p.opponent_real_logps, p.opponent_generated_logps)]
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation=attention.NAME)
    with torch.no_grad():
        found = PolicyLogps(lm)(pack(pairs, share_prompt=True))
    np.testing.assert_allclose(found, np.concatenate(known), atol=1e-5)


def test_memory_bench_draws_its_picture(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(memory, "SWEEPS", {name: [memory.Point(vocabulary=500, pairs=2)] for name in memory.SWEEPS})
    assert main(["bench", "memory", "--model", "tiny", "--picture", str(tmp_path / "memory.png")]) == 0
    [point] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert 0.1 < point["peak_gib"] < 5
    assert (tmp_path / "memory.png").stat().st_size > 5_000


def test_unknown_bench_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "speed"])
    assert "'learner'" in capsys.readouterr().err


def test_our_contestant_imports_neither_ray_nor_vllm():
    code = "import sys, spin_ray.learner.engine, spin_ray.bench.contestants; print([m for m in ('ray', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_bench_on_a_gpu(capfd):
    assert main(["bench", "learner", "--device", "cuda", "--model", "tiny", "--steps", "1", "--batch-pairs", "8"]) == 0
    assert set(json.loads(capfd.readouterr().out.splitlines()[-1])) == KEYS
