"""As many workers as there is room for, within the bounds of `learner.num_workers`: Ray Train's elastic scaling, by what is free.

Ray Train's own policy counts what the nodes have, so it would wait for the samplers' GPUs; and it ends a group of workers at any moment,
with the steps since its last progress. So here

| when | the number of workers |
|---|---|
| a group starts, also after a death | what fits on the nodes of `learner.label_selector`, once that has been the same for SETTLED_S |
| twice, MONITOR_S apart, there is room for more | the group saves its progress and ends, and the next is larger |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from spin_ray.nodes import Actors, DoNotFit, Node, Selector, check_fit
from spin_ray.placement import free_of_cluster

SETTLED_S = 5.0
"""What a dead group held comes back bit by bit."""
MONITOR_S = 10.0
"""A larger group costs a start of processes and a load of the model."""


def num_fitting(free: Sequence[Node], worker: Actors, beside: Sequence[Actors] = ()) -> int:
    """How many workers fit now, `worker.number` at most, if `beside` is to find its place too."""
    for number in range(worker.number, 0, -1):
        with suppress(DoNotFit):
            check_fit(free, [replace(worker, number=number), *beside])
            return number
    return 0


class ByWhatIsFree(ElasticScalingPolicy):
    """Lives in Ray Train's controller."""

    def __init__(
        self, scaling_config: ray.train.ScalingConfig, coordinator: Any, selector: Selector, beside: Sequence[Actors] = (),
        free: Callable[[], Sequence[Node]] = free_of_cluster, now: Callable[[], float] = time.monotonic,
    ):
        """`beside`: small actors that may start after the workers, and need their place."""
        super().__init__(scaling_config)
        self._coordinator, self._selector, self._beside, self._free, self._now = coordinator, selector, beside, free, now
        self._seen, self._seen_at = -1, 0.0
        self._monitored_at, self._had_room = float("-inf"), False

    def make_decision_for_non_running_worker_group(self) -> NoopDecision | ResizeDecision:
        self._maybe_send_resource_request()
        fitting, now = self._fitting(self.scaling_config.max_workers, self._beside), self._now()
        if fitting != self._seen:
            self._seen, self._seen_at = fitting, now
        full = fitting == self.scaling_config.max_workers
        if fitting < self.scaling_config.min_workers or not (full or now - self._seen_at >= SETTLED_S):
            return NoopDecision()
        self._seen, self._monitored_at, self._had_room = -1, now, False
        return self._get_resize_decision(fitting)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        self._maybe_send_resource_request()
        running, now = worker_group_state.num_workers, self._now()
        if now - self._monitored_at >= MONITOR_S:
            has_room = self._fitting(self.scaling_config.max_workers - running) > 0
            if has_room and self._had_room:  # not what is free for a moment, while something starts anew
                ray.get(self._coordinator.make_room.remote())
            self._monitored_at, self._had_room = now, has_room
        return NoopDecision()

    def _fitting(self, most: int, beside: Sequence[Actors] = ()) -> int:
        each = self.scaling_config._resources_per_worker_not_none
        return num_fitting(self._free(), Actors("learner", most, each, self._selector), beside)
