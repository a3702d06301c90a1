"""As many workers as there is room for, within the bounds of `learner.num_workers`: Ray Train's elastic scaling, by what is free.

Ray Train's own policy counts what the nodes have, so it would wait for the samplers' GPUs; and it ends a group of workers at any moment,
with the steps since its last progress. So here

| when | the number of workers |
|---|---|
| a group starts, also after a death | what fits on the nodes of `learner.label_selector`, once that has been the same for SETTLED_S |
| there is room for more | the coordinator is told, every MONITOR_S; the group saves its progress and ends; the next is larger |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from spin_ray.nodes import Node, Selector, room
from spin_ray.placement import free_of_cluster

SETTLED_S = 5.0
"""What a dead group held comes back bit by bit."""
MONITOR_S = 15.0
"""A larger group costs a start of processes and a load of the model."""


def num_fitting(free: Sequence[Node], each: Mapping[str, float], selector: Selector, *, most: int) -> int:
    """How many workers fit now, `most` at most."""
    return int(min(most, sum(room(node.resources, each) for node in free if node.is_meant(selector))))


class ByWhatIsFree(ElasticScalingPolicy):
    """Lives in Ray Train's controller."""

    def __init__(
        self, scaling_config: ray.train.ScalingConfig, coordinator: Any, selector: Selector,
        free: Callable[[], Sequence[Node]] = free_of_cluster, now: Callable[[], float] = time.monotonic,
    ):
        super().__init__(scaling_config)
        self._coordinator, self._selector, self._free, self._now = coordinator, selector, free, now
        self._seen, self._seen_at = -1, 0.0
        self._monitored_at = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> NoopDecision | ResizeDecision:
        self._maybe_send_resource_request()
        fitting, now = self._fitting(self.scaling_config.max_workers), self._now()
        if fitting != self._seen:
            self._seen, self._seen_at = fitting, now
        full = fitting == self.scaling_config.max_workers
        if fitting < self.scaling_config.min_workers or not (full or now - self._seen_at >= SETTLED_S):
            return NoopDecision()
        self._seen, self._monitored_at = -1, now
        return self._get_resize_decision(fitting)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        self._maybe_send_resource_request()
        running, now = worker_group_state.num_workers, self._now()
        if now - self._monitored_at >= MONITOR_S:
            self._monitored_at = now
            if self._fitting(self.scaling_config.max_workers - running):
                ray.get(self._coordinator.make_room.remote())
        return NoopDecision()

    def _fitting(self, most: int) -> int:
        return num_fitting(self._free(), self.scaling_config._resources_per_worker_not_none, self._selector, most=most)
