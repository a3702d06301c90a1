"""Weights through Ray's object store: a host gets a bucket once, its engines read it where it lies. Or from disk, once they are there."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from spin_ray.config import WeightsConfig
from spin_ray.errors import WeightsLate, WeightsLost
from spin_ray.records import PublishedWeights, Saved
from spin_ray.storage import Disk


class Transport:
    def __init__(self, weights: WeightsConfig):
        self._timeout_s = weights.bucket_timeout_s

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
        buckets = await self.arrived(weights)
        saved = await asyncio.to_thread(weights.saved_at.fetched, storage) if weights.saved_at else None
        if weights.adapter or (saved and saved.adapter):
            loading = engine.load_adapter(weights.version, lambda: _adapter(weights, buckets, saved, started))
        else:
            loading = engine.load(weights.version, lambda: _tensors(engine, weights, buckets, saved, started))
        await asyncio.wrap_future(loading)
        return time.perf_counter() - started[0]

    async def arrived(self, weights: PublishedWeights) -> list[Any]:
        """Its buckets, one after the other: side by side all of them would be under way for as long as the last one."""
        limit, buckets = self._timeout_s, []
        try:
            for reference in weights.buckets:
                buckets.append(await asyncio.wait_for(_fetched(reference), limit))
        except ray.exceptions.OwnerDiedError as error:
            raise WeightsLost(f"the weights of {weights.version} went with the learner's worker that held them") from error
        except TimeoutError as error:
            raise WeightsLate(
                f"of the weights of {weights.version}, {len(weights.buckets)} buckets, number {len(buckets) + 1} has not come from the "
                f"learner's host to {socket.gethostname()} within {limit:g} s (weights.bucket_timeout_s)"
            ) from error
        return buckets


async def _fetched(reference: Any) -> Any:
    return await reference


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
