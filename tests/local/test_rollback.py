"""Numbers that really go bad, a process that really hangs, failures past their limit: what the user sees, and what goes on."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from test_faults import ROOT, kill
from watching import records, steps, wait_for

NUM_PROMPTS = 160


def start(runs: Path) -> subprocess.Popen:
    """A learning rate that makes the weights infinite at once, until one rollback has made it 1e-3."""
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "spin_ray", "run", "conf/demo.yaml", f"run.dir={runs}", "run.name=bad", "spin.num_iterations=2",
         f"data.max_prompts={NUM_PROMPTS}", "data.eval=''", "sampler.block_prompts=16", "learner.batch_pairs=8", "spin.lr=1.0e+300",
         "guard.on_divergence=rollback", "guard.rollback_lr_factor=1.0e-303", "learner.checkpoint_every_steps=1", "learner.max_restarts=0",
         "sampler.heartbeat_timeout_s=25", "run.keep_pairs_iterations=1", "run.keep_checkpoints=2"],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


@pytest.mark.slow
def test_rollback_heartbeat_and_a_restart_too_many(tmp_path):
    run, process = tmp_path / "bad", start(tmp_path)
    wait_for(lambda: list(run.glob("iter_000/pairs/*.parquet")), "the first block")
    hung = [p for p in psutil.Process(process.pid).children(recursive=True) if (p.cmdline() or [""])[0].split(".")[0] == "ray::Sampler"]
    assert len(hung) == 1, hung
    hung[0].send_signal(signal.SIGSTOP)
    wait_for(lambda: len(steps(run, 1)) > 3, "some steps of iteration 1")
    kill(process, "ray::RayTrainWorker")
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == 1 and "rollback 1 of 2: iteration 0 starts over from theta_0 with 1e-303 times the learning rate" in output
    assert len(errors.strip().splitlines()) == 1, errors
    assert "failed more often than learner.max_restarts=0 allows; first rank 0: " in errors and "bad/logs/learner-0.log" in errors
    assert max(r.get("sampler/num_restarts", 0) for r in records(run, "metrics.jsonl")) == 1 and not hung[0].is_running()
    (mark,) = [mark for mark in records(run, "manifest.jsonl") if mark["stage"] == "rollback"]
    assert mark["iteration"] == 0 and mark["lr_scale"] == 1e-303
    assert steps(run, 0) == [*range(mark["step"]), *range(20)]  # from the start again, not from the progress that led there

    again = start(tmp_path)
    output, errors = again.communicate(timeout=1800)
    assert again.returncode == 0 and "starts over" not in output, errors
    rates = [r["train/lr"] for r in records(run, "metrics.jsonl") if "train/lr" in r]
    assert all(rate > 1e298 for rate in rates[: mark["step"]]) and all(rate <= 1e-3 * (1 + 1e-9) for rate in rates[mark["step"] :])
    assert set(steps(run, 1)) == set(range(40))
    assert all(math.isfinite(float(weight.sum())) for weight in load_file(run / "iter_001/model/model.safetensors").values())
    assert not (run / "iter_000/pairs").exists() and (run / "iter_000/checkpoint").exists() and (run / "iter_000/model").exists()
    ids = [i for path in run.glob("iter_001/pairs/block_*.parquet") for i in pq.read_table(path).column("prompt_id").to_pylist()]
    assert sorted(ids) == list(range(NUM_PROMPTS))
