"""What new weights cost the network, counted at the interface of a host with two samplers."""

import json
import sys
from pathlib import Path

import pytest
from clusters import LEARNS, PLAYS, Cluster

pytestmark = pytest.mark.slow


def test_two_samplers_on_one_host_bring_new_weights_over_the_network_once(lab):
    cluster = Cluster(lab)
    cluster.join("play", labels=PLAYS)
    cluster.join("learn", labels=LEARNS)
    script, head = Path(__file__).with_name("two_readers.py"), cluster.head
    done = head.run(sys.executable, script, RAY_ADDRESS=f"{head.address}:6379", RAY_AUTH_MODE="token")
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["hosts"] == ["play", "play"] and found["whole"]
    assert found["published"] == 48 * 2**20 and 0.95 < found["received"] / found["published"] < 1.2
