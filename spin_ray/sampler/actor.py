"""The opponent as a process: an engine with awaitable verbs. A plain class; `pool.start_opponent` makes it an actor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spin_ray.chatter import redirect_output
from spin_ray.errors import BadInput, EngineFailed, WeightsLost
from spin_ray.imports import without_gc
from spin_ray.records import Completion, PublishedWeights, SamplingSettings, Version
from spin_ray.storage import DISK, Disk


@dataclass(frozen=True)
class SamplerArgs:
    """What a replica needs to start."""

    model_path: str
    version: Version
    """What `model_path` holds."""
    dtype: str
    max_model_len: int
    """Longest prompt with its answer, in tokens."""
    seed: int
    log_path: str
    engine: Mapping[str, Any]
    env: Mapping[str, str]
    storage: Disk = DISK
    """What brings the run's own models to this node."""
    try_reload: bool = False
    """Whether to try at the start if this model's weights can be replaced."""


class Sampler:
    """One replica of the opponent. Raises (from every verb) WrongVersion, or the engine's own error once it is broken."""

    def __init__(self, args: SamplerArgs):
        redirect_output(args.log_path)
        os.environ.update(args.env)
        self._args, self._storage = args, args.storage
        model_path = str(self._storage.fetch(Path(args.model_path)))
        with without_gc():
            from spin_ray.sampler.engine import OpponentEngine  # not at the top: whoever holds the pool's handle imports this file

            self._engine = OpponentEngine(
                model_path, version=args.version, dtype=args.dtype, max_model_len=args.max_model_len, seed=args.seed, settings=args.engine
            )

    async def ready(self) -> Version:
        """Warm the engine up (the first log-probs compile for seconds) and return its version.

        Raises BadInput if the engine could not take up this model's next weights.
        """
        if self._args.try_reload:
            try:
                await asyncio.wrap_future(self._engine.try_reload())
            except EngineFailed as error:
                raise BadInput(
                    f"model.path={self._args.model_path}: the sampler's engine cannot take up new weights of this model "
                    f"({error.__cause__}), so no iteration could follow; see {self._args.log_path}"
                ) from error
        settings = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=2, stop_ids=())
        await asyncio.wrap_future(self._engine.sample(self._engine.version, [1, 1], settings))
        await asyncio.wrap_future(self._engine.score(self._engine.version, [1, 1], [1, 1]))
        return self._engine.version

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

    async def load(self, weights: PublishedWeights) -> float:
        """Load a published version in place; returns the seconds it took, waiting for answers under way not counted.

        Raises WeightsLost if they have gone with the process that published them; the engine keeps what it has.
        """
        started: list[float] = []
        try:
            buckets = await asyncio.gather(*weights.buckets)
        except ray.exceptions.OwnerDiedError as error:
            raise WeightsLost(f"the weights of {weights.version} went with the learner's worker that held them") from error
        folder = await asyncio.to_thread(self._storage.fetch, Path(weights.saved_at)) if weights.saved_at else None
        await asyncio.wrap_future(self._engine.load(weights.version, lambda: self._tensors(weights, buckets, folder, started)))
        return time.perf_counter() - started[0]

    def _tensors(
        self, weights: PublishedWeights, buckets: Sequence[Any], folder: Path | None, started: list[float]
    ) -> Iterator[tuple[str, Any]]:
        from spin_ray.exchange.weights import from_bucket, from_folder

        started.append(time.perf_counter())
        second_names = self._engine.second_names(weights.tied_names)
        if folder:
            yield from from_folder(folder, second_names)
        for bucket in buckets:
            yield from from_bucket(bucket, second_names)
