"""What a submitted job is told, and the exit code; the job itself is tests/local/test_job.py's business."""

import asyncio
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from spin_ray import submit
from spin_ray.errors import BadInput, RunStopped

ROOT = Path(__file__).parents[2]


class Cluster:
    """A cluster on which every job ends at once."""

    status, code = JobStatus.SUCCEEDED, 0

    def __init__(self):
        self.submitted = {}

    def submit_job(self, **job):
        self.submitted = job
        return "job"

    async def tail_job_logs(self, job):
        yield "log\n"

    def get_job_status(self, job):
        return self.status

    def get_job_info(self, job):
        return SimpleNamespace(driver_exit_code=self.code)


@pytest.fixture
def cluster(monkeypatch):
    cluster = Cluster()
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: cluster)
    return cluster


def test_no_secret_of_the_environment_is_passed_on(cluster, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "5ec2e7")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert asyncio.run(submit.submit(["conf/demo.yaml", "run.name=x y"])) == 0
    assert "5ec2e7" not in repr(cluster.submitted) and cluster.submitted["runtime_env"]["env_vars"]["WANDB_MODE"] == "offline"
    assert cluster.submitted["entrypoint"].endswith(f"run conf/demo.yaml run.dir={os.getcwd()}/runs 'run.name=x y'")


@pytest.mark.parametrize("arguments, message", [
    ([], "give a config file"), (["nope.yaml"], "no such config file"), (["conf/demo.yaml", "spin.lamda=3"], "unknown key"),
    (["conf/demo.yaml", "run.dir=s3://KEY:5ec2e7@bucket/runs"], "credentials"),
])
def test_what_run_would_refuse_never_reaches_the_cluster(cluster, arguments, message):
    with pytest.raises(BadInput, match=message) as refused:
        asyncio.run(submit.submit(arguments))
    assert not cluster.submitted and "5ec2e7" not in str(refused.value)


def test_no_cluster_is_one_line(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=r"no Ray cluster at http://127\.0\.0\.1:9: start one"):
        asyncio.run(submit.submit(["conf/demo.yaml"]))


def test_a_cluster_that_never_answers_is_one_line_too(monkeypatch):
    monkeypatch.setattr(submit, "CONNECT_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(BadInput, match=r"no answer of a Ray cluster within 1 s; start one"):
            asyncio.run(submit.submit(["conf/demo.yaml"]))
        assert "127.0.0.1" in os.environ["no_proxy"]


@pytest.mark.parametrize("code, expected", [(2, 2), (130, 130), (-9, 1), (None, 1)])
def test_the_exit_code_is_the_job_s(cluster, code, expected):
    cluster.status, cluster.code = JobStatus.FAILED, code
    assert asyncio.run(submit.submit(["conf/demo.yaml"])) == expected


async def never(job):
    await asyncio.get_running_loop().create_future()
    yield


def test_a_head_without_power_is_one_line(cluster, monkeypatch):
    """It closes no connection, and answers nothing."""
    monkeypatch.setattr(submit, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(submit, "SILENT_S", 0.1)
    monkeypatch.setattr(cluster, "tail_job_logs", never)
    monkeypatch.setattr(cluster, "get_job_status", lambda job: threading.Event().wait(30))
    with pytest.raises(RunStopped, match=r"no longer answers: silent for 0\.1 s; the job may go on"):
        asyncio.run(submit.submit(["conf/demo.yaml"]))


def test_a_log_that_comes_for_long_is_followed_to_its_end(cluster, monkeypatch, capsys):
    async def slow(job):
        for k in range(5):
            await asyncio.sleep(0.02)
            yield f"line {k}\n"

    monkeypatch.setattr(submit, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(cluster, "tail_job_logs", slow)
    submitted(cluster, "conf/demo.yaml")
    assert "line 0\nline 1\nline 2\nline 3\nline 4\n" in capsys.readouterr().out


def submitted(cluster, *arguments: str) -> dict:
    assert asyncio.run(submit.submit(list(arguments))) == 0
    return cluster.submitted


def test_who_does_not_wait_gets_the_jobs_id(cluster, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "tail_job_logs", None)
    submitted(cluster, "conf/demo.yaml", "--no-wait")
    assert "submitted job to " in (said := capsys.readouterr().out) and "ray job stop job" in said


def test_a_job_has_its_resources_its_metadata_and_time_to_stop(cluster):
    job = submitted(
        cluster, "--num-cpus", "1", "conf/demo.yaml", "--memory=2", "run.name=mine", "--resource", "head=0.5", "--label", "zone=b",
        "--metadata", "owner=me", "--env", "NCCL_DEBUG=INFO",
    )
    assert job["entrypoint_num_cpus"] == 1 and job["entrypoint_memory"] == 2 * 2**30 and "entrypoint_num_gpus" not in job
    assert job["entrypoint_resources"] == {"head": 0.5} and job["entrypoint_label_selector"] == {"zone": "b"}
    assert job["metadata"] == {"run": "mine", "config": "conf/demo.yaml", "spin_ray": submit.__version__, "owner": "me"}
    env = job["runtime_env"]["env_vars"]
    assert env["NCCL_DEBUG"] == "INFO" and int(env["RAY_JOB_STOP_WAIT_TIME_S"]) > 300


def test_a_stopped_job_is_told_apart_from_a_failed_one(cluster, monkeypatch):
    monkeypatch.setattr(cluster, "status", JobStatus.STOPPED)
    monkeypatch.setattr(cluster, "code", None)
    assert asyncio.run(submit.submit(["conf/demo.yaml"])) == 130


def test_a_shipped_checkout_runs_where_it_lies_then(cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("SPIN_PYTHON", "/opt/python")
    monkeypatch.chdir(tmp_path)
    job = submitted(cluster, str(ROOT / "conf/demo.yaml"), "run.dir=/data/runs", "--working-dir", str(ROOT))
    assert job["entrypoint"] == "exec /opt/python -m spin_ray run conf/demo.yaml run.dir=/data/runs"
    assert job["runtime_env"]["working_dir"] == str(ROOT) and {"runs", ".venv", ".git"} <= set(job["runtime_env"]["excludes"])


def test_a_secret_is_read_on_the_cluster(cluster):
    job = submitted(cluster, "conf/demo.yaml", "--secret", "WANDB_API_KEY=/run/secrets/wandb key")
    entry = job["entrypoint"].replace(str(ROOT), "")
    assert """export WANDB_API_KEY="$(cat '/run/secrets/wandb key')" && exec """ in entry
    assert "WANDB_API_KEY" not in job["runtime_env"]["env_vars"]


@pytest.mark.parametrize("arguments, message", [
    (["--env", "HF_TOKEN=5ec2e7"], "--env HF_TOKEN: everybody on the cluster could read it; put it into a file there"),
    (["--env", "LEVEL"], "--env LEVEL: give NAME=VALUE"),
    (["--resource", "head=much"], "--resource much: no number"),
    (["--working-dir", "tests"], "--working-dir tests: no checkout of spin_ray"),
    (["--working-dir", "."], "run.dir=runs: with --working-dir it must be an absolute path"),
])
def test_options_that_cannot_be_meant_are_one_line(cluster, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput) as refused:
        asyncio.run(submit.submit(["conf/demo.yaml", *arguments]))
    assert message in str(refused.value) and "5ec2e7" not in str(refused.value) and not cluster.submitted
