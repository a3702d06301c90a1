"""The opponent as a process: an engine with awaitable verbs. A plain class; `pool.start_opponent` makes it an actor."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from spin_ray.chatter import redirect_output
from spin_ray.errors import BadInput, EngineFailed, WeightsLate, WeightsLost
from spin_ray.imports import without_gc
from spin_ray.placement import MEMORY_SHARE, own_devices
from spin_ray.records import Completion, Devices, PublishedWeights, SamplingSettings, Saved, Version
from spin_ray.storage import DISK, Disk

if TYPE_CHECKING:
    from spin_ray.sampler.engine import OpponentEngine


@dataclass(frozen=True)
class SamplerArgs:
    """What a replica needs to start."""

    saved: Saved
    version: Version
    """What lies there."""
    dtype: str
    max_model_len: int
    """Longest prompt with its answer, in tokens."""
    seed: int
    log_path: str
    engine: Mapping[str, Any]
    env: Mapping[str, str]
    storage: Disk = DISK
    """What brings the run's own models to this node."""
    transfer_timeout_s: float = math.inf
    """Seconds without one more bucket of published weights, after which they are late."""
    try_reload: bool = False
    """Whether to try at the start if this model's weights can be replaced."""


class Sampler:
    """One replica of the opponent. Raises (from every verb) WrongVersion, or the engine's own error once it is broken.

    Its engine is made by `ready`: a process that starts in place of one that died touches no device before it is asked to.
    """

    def __init__(self, args: SamplerArgs):
        redirect_output(args.log_path)
        os.environ.update(args.env)
        self._args, self._storage = args, args.storage
        self._started: OpponentEngine | None = None

    @property
    def _engine(self) -> OpponentEngine:
        """Raises EngineFailed in a new process that is taken for the one that died: Ray hands it the next call, and nobody else says so."""
        if self._started is None:
            raise EngineFailed("its process died when it owed nothing")
        return self._started

    def _start(self) -> None:
        args, saved = self._args, self._args.saved.fetched(self._storage)
        settings = dict(args.engine)
        if settings.get("gpu_memory_utilization", 0) is None:
            settings["gpu_memory_utilization"] = _share_beside_a_learner_at_rest()
        with without_gc():
            from spin_ray.sampler.engine import OpponentEngine  # not at the top: whoever holds the pool's handle imports this file

            self._started = OpponentEngine(
                saved, version=args.version, dtype=args.dtype, max_model_len=args.max_model_len, seed=args.seed, settings=settings
            )

    async def ready(self) -> Version:
        """Start the engine, warm it up (the first log-probs compile for seconds) and return its version.

        Raises BadInput if the engine could not take up this model's next weights.
        """
        self._start()
        if self._args.try_reload:
            try:
                await asyncio.wrap_future(self._engine.try_reload())
            except EngineFailed as error:
                raise BadInput(
                    f"model.path={self._args.saved.model}: the sampler's engine cannot take up new weights of this model "
                    f"({error.__cause__}), so no iteration could follow; see {self._args.log_path}"
                ) from error
        settings = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=2, stop_ids=())
        await asyncio.wrap_future(self._engine.sample(self._engine.version, [1, 1], settings))
        await asyncio.wrap_future(self._engine.score(self._engine.version, [1, 1], [1, 1]))
        return self._engine.version

    async def sleep(self) -> Devices:
        """Free the devices' memory, and return which these are; nothing but `wake` is asked next."""
        await asyncio.wrap_future(self._engine.sleep())
        return own_devices()

    async def wake(self) -> None:
        await asyncio.wrap_future(self._engine.wake())

    async def stuck_s(self) -> float:
        """The pool's heartbeat: seconds that the engine has been at its present step."""
        return self._engine.stuck_s()

    async def sample(self, version: Version, prompts: Sequence[np.ndarray], settings: SamplingSettings) -> list[Completion]:
        futures = [self._engine.sample(version, prompt, settings) for prompt in prompts]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def score(self, version: Version, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of given answers, one array [num_answer_tokens] each, in nats."""
        futures = [self._engine.score(version, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def play(
        self, version: Version, prompts: Sequence[np.ndarray], settings: SamplingSettings, answers: Sequence[np.ndarray]
    ) -> list[tuple[Completion, np.ndarray]]:
        """`sample`, and `score` of a given answer to each prompt, which is computed once."""
        futures = [self._engine.play(version, prompt, settings, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def load(self, weights: PublishedWeights) -> float:
        """Load a published version in place; returns the seconds it took, waiting for answers under way not counted.

        Raises WeightsLost if they have gone with the process that published them, WeightsLate if they do not come; the engine keeps
        what it has.
        """
        started: list[float] = []
        buckets = await self._arrived(weights)
        saved = await asyncio.to_thread(weights.saved_at.fetched, self._storage) if weights.saved_at else None
        if weights.adapter or (saved and saved.adapter):
            loading = self._engine.load_adapter(weights.version, lambda: self._adapter(weights, buckets, saved, started))
        else:
            loading = self._engine.load(weights.version, lambda: self._tensors(weights, buckets, saved, started))
        await asyncio.wrap_future(loading)
        return time.perf_counter() - started[0]

    async def _arrived(self, weights: PublishedWeights) -> list[Any]:
        """Its buckets, one after the other: side by side all of them would be under way for as long as the last one."""
        limit, buckets = self._args.transfer_timeout_s, []
        try:
            for reference in weights.buckets:
                buckets.append(await asyncio.wait_for(_fetched(reference), limit))
        except ray.exceptions.OwnerDiedError as error:
            raise WeightsLost(f"the weights of {weights.version} went with the learner's worker that held them") from error
        except TimeoutError as error:
            raise WeightsLate(
                f"of the weights of {weights.version}, {len(weights.buckets)} buckets, number {len(buckets) + 1} has not come from the "
                f"learner's host to {socket.gethostname()} within {limit:g} s (sampler.transfer_timeout_s)"
            ) from error
        return buckets

    def _adapter(self, weights: PublishedWeights, buckets: Sequence[Any], saved: Saved | None, started: list[float]) -> Any:
        from spin_ray.exchange.adapters import AdapterFiles, read_adapter
        from spin_ray.exchange.weights import from_bucket

        started.append(time.perf_counter())
        if saved:
            return read_adapter(Path(saved.adapter))
        return AdapterFiles(weights.adapter, dict(entry for bucket in buckets for entry in from_bucket(bucket, {})))

    def _tensors(
        self, weights: PublishedWeights, buckets: Sequence[Any], saved: Saved | None, started: list[float]
    ) -> Iterator[tuple[str, Any]]:
        from spin_ray.exchange.weights import from_bucket, from_folder

        started.append(time.perf_counter())
        second_names = self._engine.second_names(weights.tied_names)
        if saved:
            yield from from_folder(Path(saved.model), second_names)
        for bucket in buckets:
            yield from from_bucket(bucket, second_names)


async def _fetched(reference: Any) -> Any:
    return await reference


def _share_beside_a_learner_at_rest() -> float:
    """Of a GPU's memory, for the engine."""
    import torch

    return min(MEMORY_SHARE, 1 - LEARNER_AT_REST_BYTES / torch.cuda.get_device_properties(0).total_memory)


LEARNER_AT_REST_BYTES = 1.5 * 2**30
"""What a learner that rests keeps of a GPU: CUDA's context, NCCL's buffers and those of the matrix library."""
