"""`cluster/submit.sh` against a Ray head on this machine: the log is followed, the exit code is the job's, a run goes on."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import ROOT, SMALL
from watching import steps, wait_for

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


@pytest.mark.slow
def test_a_checkout_is_shipped_and_a_stopped_job_goes_on(cluster, tmp_path):
    """Every process imports what was shipped; `ray job stop` lets the run save its progress, and the same submission goes on from there."""
    checkout, runs, imported = tmp_path / "checkout", tmp_path / "runs", tmp_path / "imported"
    for folder in ("spin_ray", "conf"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("learner", "sampler"):
        with (checkout / "spin_ray" / part / "__init__.py").open("a") as file:
            file.write('\nimport os\nwith open(os.environ["IMPORTED"], "a") as _file:\n    _file.write(__file__ + "\\n")\n')
    (checkout / "runs").mkdir()
    (checkout / "runs/heavy").write_bytes(bytes(2**20))
    command = [
        "conf/demo.yaml", "--working-dir", ".", "--env", f"IMPORTED={imported}", f"run.dir={runs}", "run.name=job", *SMALL, "spin.num_iterations=1",
        "spin.num_epochs=200", "data.eval=''",
    ]
    started = submit(checkout, *command, "--no-wait")
    assert started.returncode == 0, started.stdout + started.stderr
    job = re.search(r"submitted (\S+) to", started.stdout)[1]
    wait_for(lambda: len(steps(runs / "job", 0)) > 3, "some steps")
    env = {**os.environ, "RAY_AUTH_MODE": "token"}
    stopped = subprocess.run([RAY, "job", "stop", job, "--address", "http://127.0.0.1:8265"], env=env, capture_output=True, text=True, timeout=600)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    status = subprocess.run([RAY, "job", "status", job, "--address", "http://127.0.0.1:8265"], env=env, capture_output=True, text=True, timeout=60)
    assert "stopped" in status.stdout.lower() + status.stderr.lower(), status
    taken, all_steps = len(steps(runs / "job", 0)), 200 * 3
    assert 3 < taken < all_steps and (runs / "job/iter_000/progress/count.json").exists()

    done = submit(checkout, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert steps(runs / "job", 0) == list(range(all_steps))
    files = imported.read_text().splitlines()
    assert all("working_dir_files" in file for file in files) and {Path(file).parent.name for file in files} == {"learner", "sampler"}
    [shipped] = {Path(file).parents[2] for file in files}
    assert not (shipped / "runs").exists()
