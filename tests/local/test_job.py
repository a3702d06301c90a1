"""`cluster/submit.sh` against a Ray head on this machine: the log is followed, the exit code is the job's, a run goes on."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import ROOT, SMALL

RAY = Path(sys.executable).parent / "ray"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray head with token authentication (the default).

    With --block, ending it ends its own processes and no others; `ray stop` would end every Ray on this machine.
    """
    head = started_head(tmp_path_factory.mktemp("ray") / "head.log")
    yield
    head.terminate()
    head.wait(timeout=60)


def started_head(log: Path, timeout_s: float = 120) -> subprocess.Popen:
    """A head of 2 CPUs that has come up. On a very busy machine Ray may give up on itself: then once more."""
    for _ in range(3):
        with log.open("w") as output:
            head = subprocess.Popen([RAY, "start", "--head", "--block", "--num-cpus=2"], stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and head.poll() is None:
            with socket.socket() as probe:
                if "Ray runtime started" in log.read_text() and probe.connect_ex(("127.0.0.1", 8265)) == 0:
                    return head
            time.sleep(0.5)
        head.kill()
    pytest.fail(f"no Ray head: {log.read_text()[-2000:]}")


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "SPIN_PYTHON": sys.executable}
    return subprocess.run([ROOT / "cluster/submit.sh", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=1800)


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
