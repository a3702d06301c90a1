"""Weights through Ray's object store: a host gets a bucket once, its engines read it where it lies. Or from disk, once they are there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from spin_ray.errors import WeightsLost
from spin_ray.records import PublishedWeights, Saved
from spin_ray.storage import Disk


class Transport:
    def __init__(self, timeout_s: float = 0.0):
        """A fetch needs no deadline of its own: the pool has one for every load."""

    def prepare(self, *, log_path: str, env: Mapping[str, str], gpu: str) -> None:
        """Nothing is to be started."""

    def sender(self) -> None:
        return None

    def engine_settings(self) -> dict[str, Any]:
        return {}

    async def serve(self, verb: str, arguments: Mapping[str, Any]) -> None:
        raise AssertionError("nobody sends")

    async def load(self, engine: Any, weights: PublishedWeights, storage: Disk) -> float:
        started: list[float] = []
        try:
            buckets = await asyncio.gather(*weights.buckets)
        except ray.exceptions.OwnerDiedError as error:
            raise WeightsLost(f"the weights of {weights.version} went with the learner's worker that held them") from error
        saved = await asyncio.to_thread(weights.saved_at.fetched, storage) if weights.saved_at else None
        if weights.adapter or (saved and saved.adapter):
            loading = engine.load_adapter(weights.version, lambda: _adapter(weights, buckets, saved, started))
        else:
            loading = engine.load(weights.version, lambda: _tensors(engine, weights, buckets, saved, started))
        await asyncio.wrap_future(loading)
        return time.perf_counter() - started[0]


def _adapter(weights: PublishedWeights, buckets: Sequence[Any], saved: Saved | None, started: list[float]) -> Any:
    from spin_ray.exchange.adapters import AdapterFiles, read_adapter
    from spin_ray.exchange.weights import from_bucket

    started.append(time.perf_counter())
    if saved:
        return read_adapter(Path(saved.adapter))
    return AdapterFiles(weights.adapter, dict(entry for bucket in buckets for entry in from_bucket(bucket, {})))


def _tensors(
    engine: Any, weights: PublishedWeights, buckets: Sequence[Any], saved: Saved | None, started: list[float]
) -> Iterator[tuple[str, Any]]:
    from spin_ray.exchange.weights import from_bucket, from_folder

    started.append(time.perf_counter())
    second_names = engine.second_names(weights.tied_names)
    if saved:
        yield from from_folder(Path(saved.model), second_names)
    for bucket in buckets:
        yield from from_bucket(bucket, second_names)
