"""A learner with bounds for its number of workers: it begins with what is free, grows when there is room, and a later session has another number."""

import os
import signal
import subprocess
import sys

import pytest
from test_job import started_head
from test_run import ROOT
from watching import records, steps, wait_for

pytestmark = pytest.mark.slow

NUM_STEPS = 40 * 30
HOLDS_A_CPU = """
import ray
ray.init(address="auto")
actor = ray.remote(num_cpus=1)(type("Hog", (), {"here": lambda self: "held"})).remote()
print(ray.get(actor.here.remote()), flush=True)
input()
"""


@pytest.fixture
def somebody_else(tmp_path):
    """A process that holds one of the cluster's two CPUs."""
    head = started_head(tmp_path / "head.log")
    env = {**os.environ, "RAY_AUTH_MODE": "token"}
    held = subprocess.Popen([sys.executable, "-c", HOLDS_A_CPU], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while "held" not in (line := held.stdout.readline()):
            assert line, "it did not start"
        yield held
    finally:
        for process in (held, head):
            process.terminate()
            process.wait(timeout=60)


def started(folder, num_workers):
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": "127.0.0.1:6379"}
    return subprocess.Popen(
        [sys.executable, "-m", "spin_ray", "run", "conf/demo.yaml", f"run.dir={folder}", "run.name=elastic", f"learner.num_workers={num_workers}",
         "spin.num_iterations=1", "spin.num_epochs=30", "data.max_prompts=320", "data.eval=''", "learner.batch_pairs=8", "learner.cpus_per_worker=0.5",
         "sampler.cpus_per_replica=0.25", "sampler.block_prompts=16"],
        cwd=ROOT, env=env, stdout=(folder / "out.log").open("a"), stderr=subprocess.STDOUT,
    )


def test_workers_come_when_there_is_room_and_a_session_may_have_fewer(somebody_else, tmp_path):
    run, said = tmp_path / "elastic", tmp_path / "out.log"

    def sizes():
        return [record["learner/num_workers"] for record in records(run, "metrics.jsonl") if "learner/num_workers" in record]

    first = started(tmp_path, "{min: 1, max: 2}")
    try:
        wait_for(lambda: steps(run, 0) or first.poll() is not None, "the first step")
        assert sizes() == [1], said.read_text()[-3000:]
        somebody_else.terminate()
        wait_for(lambda: sizes() == [1, 2] or first.poll() is not None, "a second worker")
        so_far = len(steps(run, 0))
        wait_for(lambda: len(steps(run, 0)) > so_far or first.poll() is not None, "its first step")
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=600) == 130, said.read_text()[-3000:]
    finally:
        first.kill()
    taken = len(steps(run, 0))
    assert so_far < taken < NUM_STEPS and not (run / "iter_000/model").exists()
    second = started(tmp_path, "1")
    assert second.wait(timeout=1200) == 0, said.read_text()[-3000:]
    assert steps(run, 0) == list(range(NUM_STEPS))  # none twice, none left out
    assert "main player  1 worker\n" in said.read_text() and "main player  2 workers\n" in said.read_text()
