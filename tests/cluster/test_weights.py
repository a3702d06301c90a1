"""What new weights cost the network, counted at the interface of a host with two samplers."""

import pytest
from clusters import LEARNS, PLAYS, Cluster, finished, words
from watching import records, wait_for

from spin_ray.bench.sync import save_random_model

pytestmark = pytest.mark.slow

NUM_BLOCKS = 2
LARGE = (
    "spin.num_iterations=1", f"data.max_prompts={16 * NUM_BLOCKS}", "data.eval=''", "sampler.block_prompts=16", "sampler.max_new_tokens=16",
    "learner.batch_pairs=8", "overlap.mode=sequential", "sampler.num_replicas=2",
)
"""Training takes seconds, in which nothing is sent to samplers: so the counter is read between the last block and the new weights."""


@pytest.fixture(scope="module")
def cluster(lab) -> Cluster:
    made = Cluster(lab)
    made.join("play", labels=PLAYS)
    made.join("learn", labels=LEARNS)
    save_random_model(lab.shared / "model", hidden=512, layers=3)
    return made


@pytest.mark.parametrize("transport, times", [("object_store", 1), ("gloo", 2)])
def test_new_weights_pass_to_a_host_once_by_the_object_store_and_to_every_sampler_by_a_sender(cluster, transport, times):
    model, run = cluster.lab.shared / "model", cluster.lab.shared / "runs" / transport
    job = cluster.submit(*words("conf/demo.yaml", transport, *LARGE, f"model.path={model}", f"weights.transport={transport}"))

    def there(condition):
        assert job.poll() is None, job.stdout.read()[-4000:]
        return condition()

    wait_for(lambda: there(lambda: len([*run.glob("iter_000/pairs/block_*.parquet")]) == NUM_BLOCKS), "all blocks")
    before = cluster.nodes["play"].received_bytes()
    assert not syncs(run)
    wait_for(lambda: there(lambda: syncs(run)), "new weights in the samplers")
    received, size = cluster.nodes["play"].received_bytes() - before, (model / "model.safetensors").stat().st_size
    print(f"{transport}: {received / 1e6:.1f} MB for a model of {size / 1e6:.1f} MB")
    assert size > 40e6 and 0.95 * times * size < received < 1.2 * times * size
    finished(job)
    assert syncs(run)[0].get("sync/num_failed_transfers", 0) == 0


def syncs(run):
    return [record for record in records(run, "metrics.jsonl") if "sync/load_s" in record]
