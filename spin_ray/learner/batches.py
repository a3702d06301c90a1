"""An iteration's pairs in the order in which they are trained on, and the learning rate of each step. The same on every rank."""

from __future__ import annotations

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


class BlockFeed:
    """An iteration's blocks in order, read ahead by a thread of its own; knows how long it had to wait for them.

    `log_span(activity, begin, end)` hears of the stretches of training between two waits, by the clock `now`.
    """

    def __init__(
        self, coordinator: Any, iteration: int, num_blocks: int, log_span: Callable[[str, float, float], None],
        now: Callable[[], float] = time.time,
    ):
        self._coordinator, self._iteration, self._num_blocks, self._log_span = coordinator, iteration, num_blocks, log_span
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
            yield block

    def close(self) -> None:
        """Report the last stretch."""
        self._log_span("train", self._busy_since, self._now())

    def _fetch(self) -> None:
        try:
            place = 0
            while place < self._num_blocks:
                references = unwrapped(self._coordinator.blocks.remote(self._iteration, place))
                for block in ray.get(references):
                    self._fetched.put(block.pairs())
                place += len(references)
        except BaseException as error:  # raised where the blocks are waited for
            self._fetched.put(error)


def batches(blocks: Iterable[list[Any]], command: Train, *, batch_pairs: int, seed: int) -> Iterator[list[Any]]:
    """Global batches of all epochs, the same on every rank.

    Epoch 0 takes the pairs as their blocks come in, later epochs in seeded random order. Every pair comes once per epoch;
    the last batch of an epoch may be smaller.
    """
    pairs: list[Any] = []
    taken = 0
    for block in blocks:
        pairs += block
        while len(pairs) - taken >= batch_pairs:
            yield pairs[taken : taken + batch_pairs]
            taken += batch_pairs
    if len(pairs) != sum(command.block_sizes):
        raise RuntimeError(f"iteration {command.iteration} has {len(pairs)} pairs, expected {sum(command.block_sizes)}")
    if taken < len(pairs):
        yield pairs[taken:]
    for epoch in range(1, command.num_epochs):
        order = np.random.default_rng([seed, command.iteration, epoch]).permutation(len(pairs))
        for start in range(0, len(order), batch_pairs):
            yield [pairs[i] for i in order[start : start + batch_pairs]]


def learning_rate(step: int, total_steps: int, *, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up, then linear decay to 0, as in the paper's recipe. Never 0: the first step already moves."""
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total_steps - step) / (total_steps - warmup)
