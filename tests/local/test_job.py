"""`cluster/submit.sh` against a Ray head on this machine: the log is followed, the exit code is the job's, a run goes on."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest
from test_run import ROOT, SMALL

RAY = Path(sys.executable).parent / "ray"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray head with token authentication (the default).

    With --block, ending it ends its own processes and no others; `ray stop` would end every Ray on this machine.
    """
    with (tmp_path_factory.mktemp("ray") / "head.log").open("w+") as log:
        head = subprocess.Popen([RAY, "start", "--head", "--block", "--num-cpus=2"], stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for_dashboard(head, log)
            yield
        finally:
            head.terminate()
            head.wait(timeout=60)


def wait_for_dashboard(head: subprocess.Popen, log: TextIO, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 8265)) == 0:
                return
        time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"no Ray head after {timeout_s} s: {log.read()[-2000:]}")


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
