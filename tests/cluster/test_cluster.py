"""A job over four hosts, and what may happen to them while it goes on. Each time it ends as if nothing had happened."""

import subprocess
import time
from pathlib import Path

import pytest
from clusters import LEARNS, PLAYS, Cluster, finished, words
from watching import steps, wait_for

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
        self.run = cluster.lab.shared / "runs" / name
        self.process: subprocess.Popen = cluster.submit(*words("conf/demo.yaml", name, *SMALL, *more))

    def wait_for_step(self, iteration: int, step: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.process.stdout.read()[-4000:]
            return max(steps(self.run, iteration), default=-1) >= step

        wait_for(there, f"step {step} of iteration {iteration}")

    def assert_equals(self, undisturbed: Path) -> str:
        """As in the undisturbed run is every pair, once, and every model. Returns what the job has said."""
        said = finished(self.process)
        found = compare(undisturbed, self.run)
        near = found.pop("weight_difference") <= WEIGHT_TOLERANCE and found.pop("nll_difference") <= NLL_TOLERANCE
        assert near and not any(found.values()), found
        return said


def test_a_job_plays_over_all_hosts(cluster, undisturbed):
    assert (undisturbed / "iter_001/model/model.safetensors").is_file()


@pytest.mark.parametrize("role, step, lost, joins", [(PLAYS, 3, "play2", "play3"), (LEARNS, 12, "learn1", "learn2")])
def test_a_host_loses_power_and_another_joins(cluster, undisturbed, role, step, lost, joins):
    job = Job(cluster, lost)
    job.wait_for_step(0, step)
    cluster.nodes[lost].power_cut()
    cluster.join(joins, labels=role)
    job.assert_equals(undisturbed)


def test_the_link_between_learner_and_samplers_is_cut_for_half_a_minute(cluster, undisturbed):
    hosts = [cluster.nodes[name] for name in ("learn2", "play1", "play3")]
    job = Job(cluster, "cut")
    job.wait_for_step(0, 3)
    cluster.lab.cut(*hosts)
    time.sleep(30)
    cluster.lab.mend(*hosts)
    job.assert_equals(undisturbed)
