"""`cluster/submit.sh` against a Ray head on this machine: the log is followed, the exit code is the job's, a run goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import ROOT, SMALL

RAY = Path(sys.executable).parent / "ray"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray head with token authentication (the default), started and ended as the README says."""
    env = {**os.environ, "RAY_TMPDIR": "/tmp"}
    started = subprocess.run([RAY, "start", "--head", "--num-cpus=2"], env=env, capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stderr
    yield
    subprocess.run([RAY, "stop"], capture_output=True, timeout=120, check=True)


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "SPIN_PYTHON": sys.executable}
    return subprocess.run([ROOT / "cluster/submit.sh", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=420)


def test_submit_follow_resume_and_exit_codes(cluster, tmp_path):
    command = [str(ROOT / "conf/demo.yaml"), "run.name=job", *SMALL, "spin.num_iterations=1"]
    done = submit(tmp_path, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "finished: the model is" in done.stdout
    assert (tmp_path / "runs/job/iter_000/model/model.safetensors").is_file()

    again = submit(tmp_path, *command)
    assert again.returncode == 0 and "is finished" in again.stdout
    refused = submit(tmp_path, *command, "spin.beta=0.7")
    assert refused.returncode == 2 and "spin.beta: 0.1 -> 0.7" in refused.stdout
