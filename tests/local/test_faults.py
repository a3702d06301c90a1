"""Processes that are really killed while a run goes on: it ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 320


def start(runs: Path, name: str) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "spin_ray", "run", "conf/demo.yaml", f"run.dir={runs}", f"run.name={name}", "spin.num_iterations=2",
         f"data.max_prompts={NUM_PROMPTS}", "data.eval=''", "sampler.block_prompts=16", "learner.batch_pairs=8", "sampler.temperature=0",
         "learner.checkpoint_every_steps=5"],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


def records(run: Path, file: str) -> list[dict]:
    path = run / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, what: str, timeout: float = 240) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, f"waited {timeout} s for {what}"
        time.sleep(0.02)


def kill(run: subprocess.Popen, title: str) -> None:
    """SIGKILL the process of the run that shows this title, or a call of that actor."""
    found = [p for p in psutil.Process(run.pid).children(recursive=True) if (p.cmdline() or [""])[0].split(".")[0] == title]
    assert len(found) == 1, found
    found[0].kill()


def steps(run: Path, iteration: int) -> list[int]:
    return [r["step"] for r in records(run, "metrics.jsonl") if "train/loss" in r and r["iteration"] == iteration]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert start(runs, "undisturbed").wait(timeout=400) == 0
    return runs / "undisturbed"


def test_sampler_and_learner_die_and_the_run_ends_as_if_nothing_had_happened(undisturbed):
    run = undisturbed.parent / "disturbed"
    process = start(run.parent, run.name)
    wait_for(lambda: list(run.glob("iter_000/pairs/*.parquet")), "the first block")
    kill(process, "ray::Sampler")
    wait_for(lambda: len(steps(run, 0)) > 12, "some steps of iteration 0")
    kill(process, "ray::RayTrainWorker")
    wait_for(lambda: len(steps(run, 1)) > 7, "some steps of iteration 1")
    kill(process, "ray::RayTrainWorker")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    assert max(r.get("sampler/num_restarts", 0) for r in records(run, "metrics.jsonl")) == 1
    for t, total in ((0, 40), (1, 80)):
        done = steps(run, t)
        assert set(done) == set(range(total)) and len(done) < 2 * total  # gone on from the last progress, not from the start
        ids = [i for path in run.glob(f"iter_00{t}/pairs/block_*.parquet") for i in pq.read_table(path).column("prompt_id").to_pylist()]
        assert sorted(ids) == list(range(NUM_PROMPTS))
    reports = [mark["report"] for mark in records(run, "manifest.jsonl") if mark["stage"] == "iteration"]
    assert [report["num_pairs"] for report in reports] == [NUM_PROMPTS, 2 * NUM_PROMPTS]
    for path in undisturbed.glob("iter_*/pairs/*.parquet"):
        expected, found = pq.read_table(path), pq.read_table(run / path.relative_to(undisturbed))
        assert expected.column("generated_ids") == found.column("generated_ids"), path
    theirs = load_file(run / "iter_001/model/model.safetensors")
    for name, weight in load_file(undisturbed / "iter_001/model/model.safetensors").items():
        assert (weight - theirs[name]).abs().mean() < 1e-5, name
    assert not list(run.rglob("progress")) and not list(run.rglob(".*.tmp"))


def test_interrupted_run_saves_its_progress_leaves_nothing_behind_and_goes_on(undisturbed):
    run = undisturbed.parent / "interrupted"
    process = start(run.parent, run.name)
    wait_for(lambda: len(steps(run, 0)) > 6, "some steps of iteration 0")
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "of iteration 0; the same command goes on" in output
    psutil.wait_procs(family, timeout=30)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert (run / "iter_000/progress/count.json").is_file()
    done, interrupted_at = steps(run, 0), json.loads((run / "iter_000/progress/count.json").read_text())["steps"]
    assert done == list(range(interrupted_at))
    assert start(run.parent, run.name).wait(timeout=400) == 0
    assert steps(run, 0) == list(range(40)) and steps(run, 1) == list(range(80))  # no step twice
    theirs = load_file(run / "iter_001/model/model.safetensors")
    for name, weight in load_file(undisturbed / "iter_001/model/model.safetensors").items():
        assert (weight - theirs[name]).abs().mean() < 1e-5, name
