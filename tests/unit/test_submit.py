"""What a submitted job is told, and the exit code; the job itself is tests/local/test_job.py's business."""

import asyncio
import os
import socket
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from spin_ray import submit
from spin_ray.errors import BadInput


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
    assert cluster.submitted["entrypoint"].endswith("run conf/demo.yaml 'run.name=x y'")


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
