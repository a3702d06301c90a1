"""A cluster that is not whole: hosts that come late, lines and heads that are gone for good, clocks that are off, folders that lack files."""

import subprocess
import time
from pathlib import Path

import pytest
from clusters import LEARNS, PLAYS, ROOT, Cluster, finished, words
from test_cluster import SMALL, Job
from watching import records, wait_for

from spin_ray.timeline import read_spans

pytestmark = pytest.mark.slow

ON_CPUS = ("sampler.gpus_per_replica=0", "learner.gpus_per_worker=0")
"""Where nodes may still come, a run has to say whether it wants GPUs."""
CLOCKS = {"play3": 300.0, "learn2": -300.0}
"""Seconds by which hosts are off."""


@pytest.fixture(scope="module")
def cluster(lab) -> Cluster:
    made = Cluster(lab)
    for name in ("play1", "play2"):
        made.join(name, labels=PLAYS)
    return made


@pytest.fixture(scope="module")
def late(cluster) -> tuple[Path, str]:
    """A run whose learner's host came when it was waited for, and what it has said. It also says what is to come of the others."""
    before = said_on_head(cluster).count("waiting, ")  # of the job before
    job = cluster.submit(*words("conf/demo.yaml", "late", *SMALL, *ON_CPUS, "cluster.wait_s=300"))
    wait_for(lambda: said_on_head(cluster).count("waiting, ") > before or job.poll() is not None, "the job to wait for a learner's host", 240)
    cluster.join("learn1", labels=LEARNS)
    return cluster.lab.shared / "runs/late", finished(job)


def said_on_head(cluster: Cluster) -> str:
    """What the jobs of the present cluster have said."""
    return cluster.head.run("sh", "-c", "cat /tmp/ray/session_latest/logs/job-driver-*.log").stdout


def refused(job: subprocess.Popen, *parts: str, timeout_s: float = 300.0) -> None:
    """The job has ended with one line, in which these stand."""
    output, _ = job.communicate(timeout=timeout_s)
    assert job.returncode == 2, output[-4000:]
    lines = [line for line in output.splitlines() if line.startswith("spin-ray: ")]
    assert any(all(part in line for part in parts) for line in lines), output[-4000:]


def test_a_job_whose_hosts_do_not_come_says_what_is_missing(cluster):
    job = cluster.submit(*words("conf/demo.yaml", "never", *SMALL, *ON_CPUS, "cluster.wait_s=3"))
    there = [f"{cluster.nodes[name].address} has 0 GPU, 2 CPU, role=sampler" for name in ("play1", "play2")]
    refused(job, "1 learner", "role=learner", "0.5 CPU", f"{cluster.head.address} has 0 GPU, 0 CPU", *there, "waited 3 s (cluster.wait_s)")


def test_a_job_waits_for_a_host_and_says_for_which(late):
    run, said = late
    assert "(cluster.wait_s): no node of the cluster has the labels of the learner: role=learner" in said and "there is room, after" in said
    assert (run / "iter_001/model/model.safetensors").is_file()


def test_the_link_between_learner_and_samplers_is_cut_for_good(cluster, late):
    hosts = [cluster.nodes[name] for name in ("learn1", "play1", "play2")]
    job = Job(cluster, "cut", "weights.bucket_timeout_s=10")
    job.wait_for_step(0, 3)
    cluster.lab.cut(*hosts)
    said = job.assert_equals(late[0])
    cluster.lab.mend(*hosts)
    assert said.count("within 10 s (weights.bucket_timeout_s); the samplers read them in the run directory") == 2
    assert [r["sync/from_run_dir"] for r in records(job.run, "metrics.jsonl") if "sync/from_run_dir" in r][:2] == [1, 1]


@pytest.mark.parametrize("lacking", ["model", "model/model.safetensors"])
def test_one_of_two_learner_hosts_lacks_the_model(cluster, late, lacking):
    if "learn3" not in cluster.nodes:
        cluster.join("learn3", labels=LEARNS)
        for host in (cluster.head, cluster.desk, *cluster.nodes.values()):
            assert host.run("cp", "-r", ROOT / "spin_ray/demo/sft", "/tmp/model").returncode == 0
    host = cluster.nodes["learn3"]
    host.run("mv", f"/tmp/{lacking}", "/tmp/away")
    name = f"lacks_{Path(lacking).name}"
    job = cluster.submit(*words(
        "conf/demo.yaml", name, *SMALL, "model.path=/tmp/model", "learner.num_workers=2", "learner.zero_stage=3",
        "learner.cpus_per_worker=1.5",  # one a host, beside a process of the play pipeline that Ray may put there
    ))
    refused(job, "learn3", "/tmp/model")
    host.run("mv", "/tmp/away", f"/tmp/{lacking}")


def test_clocks_that_are_five_minutes_off_change_nothing(cluster, late):
    """Behind the others: where one of two learner's hosts has such a clock, what fakes it keeps their processes from meeting."""
    if spare := cluster.nodes.pop("learn3", None):
        spare.power_cut()
    for gone, comes, labels in (("play2", "play3", PLAYS), ("learn1", "learn2", LEARNS)):
        cluster.nodes.pop(gone).power_cut()
        cluster.join(comes, labels=labels, clock_s=CLOCKS[comes])
    begun = time.time()
    job = Job(cluster, "clocks")
    job.assert_equals(late[0])
    spans, ended = read_spans(job.run), time.time()
    assert {"main player", "opponent 0", "opponent 1"} <= {span.player for span in spans}
    assert all(begun < span.begin <= span.end < ended for span in spans)
    assert all(0 <= r["iteration/learner_idle_share"] <= 1 for r in records(job.run, "metrics.jsonl") if "iteration/learner_idle_share" in r)


def test_the_head_dies_and_comes_back(cluster, late):
    job = Job(cluster, "head")
    job.wait_for_step(0, 12)
    cluster.head.power_cut()
    output, _ = job.process.communicate(timeout=300)
    assert job.process.returncode == 1 and "no longer answers" in output, output[-3000:]
    for host in cluster.nodes.values():  # or Ray ends there by itself, after three minutes
        host.power_cut()
    cluster.start_head()
    for name in cluster.nodes:
        cluster.join(name, labels=PLAYS if "play" in name else LEARNS, clock_s=CLOCKS.get(name, 0.0))
    Job(cluster, "head").assert_equals(late[0])
