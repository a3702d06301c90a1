"""A main player that only takes the time a real one would: for measuring the orchestration around it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from spin_ray.learner.coordinator import Base
from spin_ray.learner.loop import WorkerArgs
from spin_ray.records import Pair, Saved, opponent_reference


def make_fake_player(
    args: WorkerArgs, base: Base, *, pairs_per_s: Sequence[float], weights_mib: float = 0.0, rest_s: float = 0.0, wake_s: float = 0.0,
) -> FakePlayer:
    """`pairs_per_s` of all workers together, one value per iteration; it publishes so many MiB of weights."""
    return FakePlayer(pairs_per_s, weights_mib, rest_s, wake_s)


LATE_S = 0.05
"""A step that begins no later than this after the last one's due time counts as begun then: waking up is not part of a step."""


class FakePlayer:
    """Has the verbs of `MainPlayer` that a run uses; a step sleeps, and no weight ever moves."""

    def __init__(self, pairs_per_s: Sequence[float], weights_mib: float, rest_s: float, wake_s: float):
        self.rank = dist.get_rank()
        self._rates = iter(pairs_per_s)
        self._rate = math.inf
        self._due = 0.0
        self._rest_s, self._wake_s = rest_s, wake_s
        self._num_weights = max(16, round(weights_mib * 2**20 / 4))
        self.tied_names: dict[str, str] = {}

    def wait_for_all_ranks(self) -> None:
        dist.barrier()

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def rest(self) -> None:
        time.sleep(self._rest_s)

    def wake(self) -> None:
        time.sleep(self._wake_s)

    def begin_iteration(self) -> None:
        self._rate = next(self._rates)
        self._due = 0.0

    def step(self, pairs: Sequence[Pair], references: np.ndarray, **_: object) -> dict[str, float]:
        now = time.monotonic()
        self._due = (self._due if now - self._due < LATE_S else now) + len(pairs) / self._rate
        time.sleep(max(0.0, self._due - now))
        dist.barrier()
        metrics = {"loss": math.log(2), "pair_loss": math.log(2), "expected_pair_loss": math.log(2), "margin": 0.0}
        return {**metrics, "num_tokens": float(sum(len(p.real_ids) + len(p.generated_ids) for p in pairs))}

    def keep_copy(self, name: str, saved: Saved | None = None) -> None:
        pass

    def score(self, pairs: Sequence[Pair], *, copy: str | None = None) -> np.ndarray:
        return np.array([opponent_reference(pair) for pair in pairs])

    def token_logps(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """What `FakeSampler.score` answers."""
        return [np.full(len(ids), -1.0, np.float32) for pair in pairs for ids in (pair.real_ids, pair.generated_ids)]

    def weights(self, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        yield [("weight", torch.zeros(self._num_weights))] if self.rank == 0 else []

    def export(self, folder: Path, bucket_bytes: int) -> None:
        if self.rank == 0:
            (folder / "fake").touch()

    def save_checkpoint(self, folder: Path) -> None:
        if self.rank == 0:
            (folder / "fake").touch()

    def load_checkpoint(self, folder: Path, *, name: str = "") -> None:
        assert (folder / "fake").exists(), name
