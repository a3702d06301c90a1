"""A small event simulation: processes that do one thing at a time, and a clock that goes from event to event. No Ray."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Process:
    """Serves what comes one after the other, first come first served: Python code has one core, whatever the process's threads.

    1 s of work each at 0 and at 0.5 s: done at 1 and at 2 s, the second one has waited 0.5 s.
    """

    def __init__(self) -> None:
        self.busy_s = self.waited_s = self.longest_wait_s = 0.0
        self.served = 0
        self._free_at = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When work that comes now is done. Calls come in the order of `now`."""
        waits = self._free_at - now
        if waits > 0:
            self.waited_s += waits
            self.longest_wait_s = max(self.longest_wait_s, waits)
            now = self._free_at
        self.busy_s += seconds
        self.served += 1
        self._free_at = now + seconds
        return self._free_at


class Servers:
    """Several alike, of which the one that is free first serves: the replicas."""

    def __init__(self, count: int) -> None:
        self._free_at = [0.0] * count

    def serve(self, now: float, seconds: float) -> float:
        done = max(now, self._free_at[0]) + seconds
        heapq.heapreplace(self._free_at, done)
        return done


class Clock:
    """Calls what was asked for when it is time; of the same time what was asked for first goes first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), do, args))

    def run(self) -> None:
        """All events, those too that come of events, until there is none."""
        while self._events:
            self.now, _, do, args = heapq.heappop(self._events)
            do(*args)

    def stop(self) -> None:
        """Nothing more happens."""
        self._events.clear()
