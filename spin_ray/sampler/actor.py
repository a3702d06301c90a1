"""The opponent as a process: an engine with awaitable verbs. A plain class; `pool.start_opponent` makes it an actor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spin_ray.chatter import redirect_output
from spin_ray.config import WeightsConfig
from spin_ray.errors import BadInput, EngineFailed
from spin_ray.imports import without_gc
from spin_ray.placement import MEMORY_SHARE, own_devices
from spin_ray.records import Completion, Devices, Likelihood, PublishedWeights, SamplingSettings, Saved, Version
from spin_ray.storage import DISK, Disk
from spin_ray.transport import transport_of

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
    try_reload: bool = False
    """Whether to try at the start if this model's weights can be replaced."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How new ones come."""


class Sampler:
    """One replica of the opponent. Raises (from every verb) WrongVersion, or the engine's own error once it is broken.

    Its engine is made by `ready`: a process that starts in place of one that died touches no device before it is asked to.
    """

    def __init__(self, args: SamplerArgs):
        redirect_output(args.log_path)
        os.environ.update(args.env)
        self._args, self._storage = args, args.storage
        self._transport, self._object_store = (transport_of(way) for way in (args.weights, replace(args.weights, transport="object_store")))
        self._started: OpponentEngine | None = None

    @property
    def _engine(self) -> OpponentEngine:
        """Raises EngineFailed in a new process that is taken for the one that died: Ray hands it the next call, and nobody else says so."""
        if self._started is None:
            raise EngineFailed("its process died when it owed nothing")
        return self._started

    def _start(self) -> None:
        args, saved = self._args, self._args.saved.fetched(self._storage)
        settings = {**args.engine, **self._transport.engine_settings()}
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

    async def likelihood(self, version: Version, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[Likelihood]:
        """What the model says of given continuations, one of each prompt."""
        futures = [self._engine.likelihood(version, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def play(
        self, version: Version, prompts: Sequence[np.ndarray], settings: SamplingSettings, answers: Sequence[np.ndarray]
    ) -> list[tuple[Completion, np.ndarray]]:
        """`sample`, and `score` of a given answer to each prompt, which is computed once."""
        futures = [self._engine.play(version, prompt, settings, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def load(self, weights: PublishedWeights) -> float:
        """Load a published version in place; returns the seconds it took, waiting for answers under way not counted.

        Raises WeightsLost if they have gone with the process that published them, WeightsLate if they do not come, and the engine keeps
        what it has; TransferFailed if a sender could not bring them, and this process must end.
        """
        way = self._transport if weights.sender else self._object_store
        return await way.load(self._engine, weights, self._storage)

    async def serve_sender(self, verb: str, arguments: Mapping[str, Any]) -> None:
        """What a sender asks of the engine while `load` waits for it."""
        await self._transport.serve(verb, arguments)


def _share_beside_a_learner_at_rest() -> float:
    """Of a GPU's memory, for the engine."""
    import torch

    return min(MEMORY_SHARE, 1 - LEARNER_AT_REST_BYTES / torch.cuda.get_device_properties(0).total_memory)


LEARNER_AT_REST_BYTES = 1.5 * 2**30
"""What a learner that rests keeps of a GPU: CUDA's context, NCCL's buffers and those of the matrix library."""
