"""How many workers a group has: what fits on the nodes that are meant, once that is settled; a larger group follows when there is room."""

from types import SimpleNamespace

import pytest
import ray.train
from hypothesis import given
from hypothesis import strategies as st
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from spin_ray.learner import elastic
from spin_ray.learner.elastic import MONITOR_S, SETTLED_S, ByWhatIsFree, num_fitting
from spin_ray.nodes import Actors, DoNotFit, Node, check_fit

GPU = {"GPU": 1.0, "CPU": 0.5}


def node(gpus, cpus=8.0, **labels):
    return Node("10.0.0.1", {"GPU": gpus, "CPU": cpus}, labels)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4), st.booleans()), max_size=5), st.integers(1, 12))
def test_so_many_fit_and_no_more(free, most):
    nodes = [node(gpus, cpus, pool="a" if meant else "b") for gpus, cpus, meant in free]
    fitting = num_fitting(nodes, Actors("worker", most, GPU, {"pool": "a"}))
    assert 0 <= fitting <= most
    if fitting:
        check_fit(nodes, [Actors("worker", fitting, GPU, {"pool": "a"})])
    if fitting < most:
        with pytest.raises(DoNotFit):
            check_fit(nodes, [Actors("worker", fitting + 1, GPU, {"pool": "a"})])


def test_what_starts_after_the_workers_finds_its_place():
    worker, play = Actors("worker", 3, {"CPU": 0.5}), Actors("play process", 1, {"CPU": 0.1})
    assert num_fitting([node(0, 1.5)], worker) == 3 and num_fitting([node(0, 1.5)], worker, [play]) == 2
    assert num_fitting([node(0, 1.5), node(0, 0.1)], worker, [play]) == 3 and num_fitting([node(0, 0.4)], worker, [play]) == 0


class Cluster:
    """What the policy sees, and what it asks for."""

    def __init__(self, monkeypatch, fewest, most):
        self.nodes, self.time, self.room = [node(0)], 0.0, 0
        monkeypatch.setattr(elastic.ray, "get", lambda answer: answer)
        coordinator = SimpleNamespace(make_room=SimpleNamespace(remote=self._make_room))
        scaling = ray.train.ScalingConfig(num_workers=(fewest, most), use_gpu=True, resources_per_worker=GPU)
        self.policy = ByWhatIsFree(scaling, coordinator, {}, free=lambda: self.nodes, now=lambda: self.time)
        self.policy._coordinator_client = SimpleNamespace(maybe_send_resource_request=lambda *_: None)

    def _make_room(self):
        self.room += 1

    def starts(self):
        """The number of workers that a group starts with now, 0 if it waits."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        assert isinstance(decision, NoopDecision | ResizeDecision)
        return getattr(decision, "num_workers", 0)

    def runs_with(self, number):
        assert isinstance(self.policy.make_decision_for_running_worker_group(SimpleNamespace(num_workers=number), None), NoopDecision)


def test_a_group_starts_with_all_at_once_or_with_what_has_stayed_the_same(monkeypatch):
    cluster = Cluster(monkeypatch, 2, 8)
    assert cluster.starts() == 0
    cluster.nodes = [node(1)]
    cluster.time = 100.0
    assert cluster.starts() == 0  # fewer than the fewest, however long
    cluster.nodes = [node(1), node(2)]
    assert cluster.starts() == 0
    cluster.time += SETTLED_S / 2
    cluster.nodes = [node(2), node(3)]  # what a dead group held comes back bit by bit
    assert cluster.starts() == 0
    cluster.time += SETTLED_S / 2
    assert cluster.starts() == 0
    cluster.time += SETTLED_S / 2
    assert cluster.starts() == 5
    cluster.nodes = [node(8), node(8)]
    assert cluster.starts() == 8


def test_a_larger_group_follows_when_there_is_room_and_none_that_is_as_large(monkeypatch):
    cluster = Cluster(monkeypatch, 1, 4)
    cluster.nodes = [node(0), node(0, 0)]
    cluster.runs_with(2)
    assert cluster.room == 0
    cluster.nodes = [node(1)]
    cluster.runs_with(2)
    assert cluster.room == 0  # not looked at yet
    for nodes, room in (([node(1)], 0), ([node(0)], 0), ([node(1)], 0), ([node(2)], 1)):  # what is free for a moment is not counted on
        cluster.time += MONITOR_S
        cluster.nodes = nodes
        cluster.runs_with(2)
        assert cluster.room == room
    cluster.time += MONITOR_S
    cluster.runs_with(4)
    assert cluster.room == 1
