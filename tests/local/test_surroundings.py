"""A run among the surroundings that people have: it works, or ends in one line with nothing left running. Real Ray, vLLM, DeepSpeed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_run import ROOT, SMALL

TINY = [*SMALL, "spin.num_iterations=1", "data.eval=", "run.max_steps=1", "sampler.max_new_tokens=8", "audit.num_prompts=2",
        "learner.max_restarts=0"]

LEARNER_FAILS = """
import sys
import spin_ray.methods.spin
from spin_ray.__main__ import main
from spin_ray.losses import PairObjective

class Fails(PairObjective):  # pickled by value: it fails in the worker
    def __call__(self, logps):
        raise KeyError("nobody\\nforesaw this")

spin_ray.methods.spin.pair_objective = lambda section, **_: Fails(section.beta)
sys.exit(main())
"""
THREAD_FAILS = """
import sys
from spin_ray.__main__ import main
from spin_ray.reporting import Reporting

def fails(*_):
    return 1 / 0

Reporting.played = fails
sys.exit(main())
"""
HALF_A_RAY = """
import os, sys, ray
from spin_ray.__main__ import main

def init(*args, **options):
    start(*args, **options)
    raise OSError(28, os.strerror(28), "/dev/shm/x")

start, ray.init = ray.init, init
sys.exit(main())
"""


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """A run named x in `folder`; SPIN_RAY_TEST marks every process that it starts."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SPIN_RAY_TEST": str(folder), **env}
    arguments = ["run", str(ROOT / "conf/demo.yaml"), "run.name=x", f"run.dir={folder}/runs", *TINY]
    return subprocess.run([sys.executable, *command, *arguments], env=env, capture_output=True, text=True, timeout=1800)


def left_running(folder: Path, within_s: float = 10) -> list[str]:
    ends = time.monotonic() + within_s
    while (left := list(marked(folder))) and time.monotonic() < ends:
        time.sleep(0.2)
    return left


def marked(folder: Path):
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("SPIN_RAY_TEST") == str(folder):
                yield f"{process.pid} {process.name()}"
        except psutil.Error:
            continue


def folders_of_sockets() -> set[Path]:
    return set(Path("/tmp").glob("spin-*-*"))


@pytest.mark.slow
def test_a_long_tmpdir_a_home_that_cannot_be_written_and_a_proxy(tmp_path):
    long = tmp_path / ("long" * 25)
    long.mkdir()
    before = folders_of_sockets()
    nowhere = "http://127.0.0.1:9"
    done = run(tmp_path, "-m", "spin_ray", TMPDIR=str(long), HOME="/proc/x", http_proxy=nowhere, https_proxy=nowhere, LC_ALL="C")
    assert done.returncode == 0 and "finished: the model is" in done.stdout, done.stderr
    assert done.stderr == f"spin-ray: /proc/x cannot be written: caches and Ray's token go to {long}/spin_ray-{os.getuid()}\n"
    assert not left_running(tmp_path) and folders_of_sockets() <= before


@pytest.mark.slow
@pytest.mark.parametrize("script, says", [
    (LEARNER_FAILS, r"KeyError.*nobody.*foresaw this.*learner"), (THREAD_FAILS, r"ZeroDivisionError: division by zero \(spin_ray/opponent\.py:\d+, in the driver\)"),
    (HALF_A_RAY, r"OSError: .*No space left on device: '/dev/shm/x' \(spin_ray/system\.py:\d+, in the driver\)"),
], ids=["learner", "thread", "half a Ray"])
def test_an_error_that_nobody_foresaw(tmp_path, script, says):
    (tmp_path / "fails.py").write_text(script)
    before = folders_of_sockets()
    ended = run(tmp_path, str(tmp_path / "fails.py"))
    assert ended.returncode == 1 and re.fullmatch(f"spin-ray: .*{says}.*\n", ended.stderr), ended.stderr
    log = tmp_path / "runs/x/logs/driver.log"
    assert "Traceback (most recent call last)" in log.read_text()
    assert not left_running(tmp_path) and folders_of_sockets() <= before
