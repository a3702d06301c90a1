"""An iteration's pairs in the order in which they are trained on, and the learning rate of each step. The same on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from spin_ray.learner.coordinator import unwrapped
from spin_ray.learner.messages import Train
from spin_ray.records import Pair, from_table

NOTICEABLE_WAIT_S = 0.05


class BlockFeed:
    """An iteration's blocks in order, asked for one ahead; knows how long it had to wait for them.

    `log_span(activity, begin, end)` hears of the stretches of training between two waits.
    """

    def __init__(self, coordinator: Any, iteration: int, num_blocks: int, log_span: Callable[[str, float, float], None]):
        self._coordinator, self._iteration, self._num_blocks, self._log_span = coordinator, iteration, num_blocks, log_span
        self.waited_s = 0.0
        self._busy_since = time.time()

    def __iter__(self) -> Iterator[list[Pair]]:
        asked = [self._ask(0)]
        for index in range(self._num_blocks):
            if index + 1 < self._num_blocks:
                asked.append(self._ask(index + 1))
            begun = time.time()
            table: pa.Table = ray.get(unwrapped(asked.pop(0))[0])
            arrived = time.time()
            self.waited_s += arrived - begun
            if arrived - begun > NOTICEABLE_WAIT_S:
                self._log_span("train", self._busy_since, begun)
                self._busy_since = arrived
            yield from_table(table, Pair)

    def close(self) -> None:
        """Report the last stretch."""
        self._log_span("train", self._busy_since, time.time())

    def _ask(self, index: int) -> Any:
        return self._coordinator.block.remote(self._iteration, index)


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
