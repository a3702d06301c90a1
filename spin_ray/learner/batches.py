"""An iteration's pairs in the order in which they are trained on, and the learning rate of each step. The same on every rank."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import ray

from spin_ray.learner.coordinator import unwrapped
from spin_ray.learner.messages import Train
from spin_ray.records import Pair

NOTICEABLE_WAIT_S = 0.05
READ_AHEAD = 16
"""Blocks in memory that no batch has begun with."""


class BlockFeed:
    """An iteration's blocks in order, read ahead by a thread of its own; knows how long it had to wait for them.

    `log_span(activity, begin, end)` hears of the stretches of training between two waits, by the clock `now`. With `wait_for_all` no
    block is read before all are played.
    """

    def __init__(
        self, coordinator: Any, iteration: int, num_blocks: int, log_span: Callable[[str, float, float], None],
        now: Callable[[], float] = time.time, *, wait_for_all: bool = False,
    ):
        self._coordinator, self._iteration, self._num_blocks, self._log_span = coordinator, iteration, num_blocks, log_span
        self._wait_for_all, self._closed, self._room = wait_for_all, False, threading.Semaphore(READ_AHEAD)
        self._fetched: queue.Queue[list[Pair] | BaseException] = queue.Queue()
        self.waited_s = 0.0
        self._now, self._busy_since = now, now()
        threading.Thread(target=self._fetch, name="block feed", daemon=True).start()

    def __iter__(self) -> Iterator[list[Pair]]:
        for _ in range(self._num_blocks):
            begun = self._now()
            block = self._fetched.get()
            arrived = self._now()
            self.waited_s += arrived - begun
            if arrived - begun > NOTICEABLE_WAIT_S:
                self._log_span("train", self._busy_since, begun)
                self._busy_since = arrived
            if isinstance(block, BaseException):
                raise block
            self._room.release()
            yield block

    def close(self) -> None:
        """Report the last stretch, and read no more."""
        self._closed = True
        self._room.release()
        self._log_span("train", self._busy_since, self._now())

    def _fetch(self) -> None:
        try:
            for block in list(self._offered()) if self._wait_for_all else self._offered():
                self._room.acquire()
                if self._closed:
                    return
                self._fetched.put(block.pairs())
        except BaseException as error:  # raised where the blocks are waited for
            self._fetched.put(error)

    def _offered(self) -> Iterator[Any]:
        """What says where each block lies, as soon as it is there."""
        place = 0
        while place < self._num_blocks:
            references = unwrapped(self._coordinator.blocks.remote(self._iteration, place))
            yield from ray.get(references)
            place += len(references)


def batches(
    blocks: Iterable[list[Any]], command: Train, kept: Any, *, batch_pairs: int, seed: int, first_step: int = 0,
) -> Iterator[list[Any]]:
    """Global batches of all epochs from `first_step` on, the same on every rank.

    Epoch 0 takes the pairs as their blocks come in, later epochs in seeded random order. Every pair comes once per epoch;
    the last batch of an epoch may be smaller. `kept`, an empty list or what is extended and indexed like one, has them for later epochs.
    """
    waiting: list[Any] = []
    num_pairs, steps = 0, itertools.count()
    for block in blocks:
        num_pairs += len(block)
        if command.num_epochs > 1:
            kept.extend(block)
        waiting += block
        while len(waiting) >= batch_pairs:
            if next(steps) >= first_step:
                yield waiting[:batch_pairs]
            waiting = waiting[batch_pairs:]
    if num_pairs != sum(command.block_sizes):
        raise RuntimeError(f"iteration {command.iteration} has {num_pairs} pairs, expected {sum(command.block_sizes)}")
    if waiting and next(steps) >= first_step:
        yield waiting
    for epoch in range(1, command.num_epochs):
        order = np.random.default_rng([seed, command.iteration, epoch]).permutation(num_pairs)
        for start in range(0, num_pairs, batch_pairs):
            if next(steps) >= first_step:
                yield [kept[int(i)] for i in order[start : start + batch_pairs]]


def learning_rate(step: int, total_steps: int, *, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up, then linear decay to 0, as in the paper's recipe. Never 0: the first step already moves."""
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total_steps - step) / (total_steps - warmup)
