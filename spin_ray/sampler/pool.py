"""All sampler replicas behind one door: prompts go to the least loaded one, weights to all.

One async actor with no CPU of its own; nothing but token ids and log-probs passes through it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.exchange.weights import PublishedWeights
from spin_ray.placement import Hardware
from spin_ray.records import Completion, SamplingSettings
from spin_ray.sampler.actor import Sampler, SamplerArgs


def start_opponent(config: Config, model_path: str, version: int, hardware: Hardware, *, max_model_len: int, logs: Path) -> Any:
    """Start all replicas with the model at `model_path` and return the pool's actor handle at once, while they load."""
    settings = {
        "tensor_parallel_size": config.sampler.tensor_parallel_size, "max_num_seqs": config.sampler.max_num_seqs,
        "trust_remote_code": config.model.trust_remote_code, **hardware.engine,
    }
    actor = ray.remote(num_cpus=config.sampler.cpus_per_replica, num_gpus=hardware.sampler_gpus, max_concurrency=10_000)(Sampler)
    samplers = [
        actor.remote(SamplerArgs(
            model_path=model_path, version=version, dtype=hardware.dtype, max_model_len=max_model_len,
            seed=config.run.seed + 1000 * version + replica,  # a resumed run must not draw its first iteration's numbers again
            log_path=str(logs / f"sampler-{replica}.log"), engine=settings, env=hardware.sampler_env,
        ))
        for replica in range(config.sampler.num_replicas)
    ]
    return ray.remote(num_cpus=0, max_concurrency=10_000)(SamplerPool).remote(samplers)


def sampling_settings(config: Config, chat: ChatFormat) -> SamplingSettings:
    sampler = config.sampler
    return SamplingSettings(sampler.temperature, sampler.top_p, sampler.max_new_tokens, tuple(sorted(chat.stop_ids)))


class SamplerPool:
    """Routes by the number of prompts that each replica has not yet answered."""

    def __init__(self, samplers: list[Any]):
        self._samplers = samplers
        self._outstanding = [0] * len(samplers)

    async def ready(self) -> list[int]:
        """Wait until every replica answers; returns their versions."""
        return await asyncio.gather(*[sampler.ready.remote() for sampler in self._samplers])

    async def sample(self, version: int, prompts: Sequence[np.ndarray], settings: SamplingSettings) -> list[Completion]:
        """One answer per prompt, in the prompts' order."""
        return await self._spread(len(prompts), lambda sampler, own: sampler.sample.remote(version, [prompts[i] for i in own], settings))

    async def score(self, version: int, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of each given answer, [num_answer_tokens], in nats."""
        return await self._spread(
            len(prompts), lambda sampler, own: sampler.score.remote(version, [prompts[i] for i in own], [answers[i] for i in own])
        )

    async def load(self, weights: PublishedWeights) -> list[float]:
        """Every replica loads the version; returns each one's seconds."""
        return await asyncio.gather(*[sampler.load.remote(weights) for sampler in self._samplers])

    async def _spread(self, count: int, call: Callable[[Any, list[int]], Any]) -> list[Any]:
        share: list[list[int]] = [[] for _ in self._samplers]
        for index in range(count):
            replica = self._outstanding.index(min(self._outstanding))
            self._outstanding[replica] += 1
            share[replica].append(index)
        results: list[Any] = [None] * count

        async def one(replica: int) -> None:
            try:
                answers = await call(self._samplers[replica], share[replica])
            finally:
                self._outstanding[replica] -= len(share[replica])
            for index, answer in zip(share[replica], answers, strict=True):
                results[index] = answer

        await asyncio.gather(*[one(replica) for replica in range(len(share)) if share[replica]])
        return results
