"""A job over four hosts, and what may happen to them while it goes on. Each time it ends as if nothing had happened."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from clusters import LEARNS, PLAYS, Cluster, finished, wait_for, words

from spin_ray.bench.chaos import NLL_TOLERANCE, WEIGHT_TOLERANCE, compare

pytestmark = pytest.mark.slow

SMALL = (
    "spin.num_iterations=2", "data.max_prompts=320", "data.max_eval_prompts=64", "sampler.block_prompts=16", "sampler.temperature=0",
    "learner.batch_pairs=8", "learner.checkpoint_every_steps=5", "sampler.num_replicas=2",
)


@pytest.fixture(scope="module")
def cluster(lab) -> Cluster:
    made = Cluster(lab)
    for name, labels in (("play1", PLAYS), ("play2", PLAYS), ("learn1", LEARNS)):
        made.join(name, labels=labels)
    return made


@pytest.fixture(scope="module")
def undisturbed(cluster) -> Path:
    finished(cluster.submit(*words("conf/demo.yaml", "undisturbed", *SMALL)))
    return cluster.lab.shared / "runs/undisturbed"


class Job:
    """A run that goes on, seen through what it marks in its directory."""

    def __init__(self, cluster: Cluster, name: str, *more: str):
        self._cluster, self.words, self.run = cluster, words("conf/demo.yaml", name, *SMALL, *more), cluster.lab.shared / "runs" / name
        self.process: subprocess.Popen = cluster.submit(*self.words)

    def records(self, file: str) -> list[dict]:
        path = self.run / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for_step(self, iteration: int, step: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.process.stdout.read()[-4000:]
            return any(r.get("iteration") == iteration and r.get("step", 0) >= step for r in self.records("metrics.jsonl") if "train/loss" in r)

        wait_for(there, f"step {step} of iteration {iteration}")

    def equals(self, undisturbed: Path) -> str:
        """What it has said; as in the undisturbed run is every pair, once, and every model."""
        said = finished(self.process)
        found = compare(undisturbed, self.run)
        near = found.pop("weight_difference") <= WEIGHT_TOLERANCE and found.pop("nll_difference") <= NLL_TOLERANCE
        assert near and not any(found.values()), found
        return said


def test_a_job_plays_over_all_hosts(cluster, undisturbed):
    assert (undisturbed / "iter_001/model/model.safetensors").is_file()


def test_a_sampler_host_loses_power_and_another_joins(cluster, undisturbed):
    job = Job(cluster, "power")
    job.wait_for_step(0, 3)
    cluster.nodes["play2"].power_cut()
    cluster.join("play3", labels=PLAYS)
    job.equals(undisturbed)


def test_the_learners_host_loses_power(cluster, undisturbed):
    job = Job(cluster, "learner")
    job.wait_for_step(0, 12)
    cluster.nodes["learn1"].power_cut()
    cluster.join("learn2", labels=LEARNS)
    job.equals(undisturbed)


def test_the_link_between_learner_and_samplers_is_cut_for_half_a_minute(cluster, undisturbed):
    learner = cluster.nodes["learn2"]
    job = Job(cluster, "cut")
    job.wait_for_step(0, 3)
    for sampler in (cluster.nodes["play1"], cluster.nodes["play3"]):
        cluster.lab.cut(learner, sampler)
    time.sleep(30)
    for sampler in (cluster.nodes["play1"], cluster.nodes["play3"]):
        cluster.lab.mend(learner, sampler)
    job.equals(undisturbed)
