"""A sampler that only takes the time a real one would: for measuring the orchestration, and for forcing what rarely happens."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

import spin_ray.exchange.weights  # noqa: F401 - buckets are of its type: torch is loaded at the start, as in a real sampler
from spin_ray.errors import EngineFailed, WrongVersion
from spin_ray.records import Completion, Devices, Likelihood, PublishedWeights, SamplingSettings, Version


class FakeSampler:
    """Has the verbs of `Sampler`. Works at a fixed rate, as one engine does that is kept full: twice the prompts, twice the time.
    Answers are drawn one request after the other; scores are prefills, which an engine puts between the tokens that it draws.

    An answer depends on its prompt alone (as greedy ones do): its tokens are a hash of it. `fail_after` prompts it raises,
    or with `dies` ends its process. `hang_after` prompts its engine answers and loads nothing more; with `mute` its process
    gives no sign of life either.
    """

    def __init__(
        self, version: Version, *, prompts_per_s: float = 1e6, scores_per_s: float = 1e6, start_s: float = 0.0, load_s: float = 0.0,
        fail_after: int | None = None, dies: bool = False, hang_after: float = math.inf, mute: bool = False,
        sleep_s: float = 0.0, wake_s: float = 0.0, answer_tokens: int = 8,
    ):
        self._version, self._answer_tokens = version, answer_tokens
        self._seconds = {"sample": 1 / prompts_per_s, "score": 1 / scores_per_s}
        self._start_s, self._load_s, self._sleep_s, self._wake_s = start_s, load_s, sleep_s, wake_s
        self._fail_after, self._dies, self._hang_after, self._mute = fail_after, dies, hang_after, mute
        self._hangs_since = math.inf
        self._free_at = 0.0
        self.num_prompts = 0

    async def ready(self) -> Version:
        await asyncio.sleep(self._start_s)
        return self._version

    async def sleep(self) -> Devices:
        await asyncio.sleep(self._sleep_s)
        return ()

    async def wake(self) -> None:
        await asyncio.sleep(self._wake_s)

    async def stuck_s(self) -> float:
        if self._mute and self._hangs_since < math.inf:
            await _forever()
        return max(0.0, time.monotonic() - self._hangs_since)

    async def sample(self, version: Version, prompts: Sequence[np.ndarray], settings: SamplingSettings) -> list[Completion]:
        await self._work("sample", version, len(prompts))
        return [self._completion(prompt, settings) for prompt in prompts]

    async def score(self, version: Version, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
        await self._work("score", version, len(prompts))
        return [np.full(len(answer), -1.0, np.float32) for answer in answers]

    async def likelihood(self, version: Version, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[Likelihood]:
        """One nat for each token; a continuation is greedy if it is of the tokens that `sample` would draw."""
        await self._work("score", version, len(prompts))
        return [Likelihood(-float(len(answer)), self._begins(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]

    async def play(
        self, version: Version, prompts: Sequence[np.ndarray], settings: SamplingSettings, answers: Sequence[np.ndarray]
    ) -> list[tuple[Completion, np.ndarray]]:
        return list(zip(await self.sample(version, prompts, settings), await self.score(version, prompts, answers), strict=True))

    async def load(self, weights: PublishedWeights) -> float:
        await self._hang_if_due()
        await asyncio.gather(*weights.buckets)
        await asyncio.sleep(self._load_s)
        self._version = weights.version
        return self._load_s

    async def _work(self, verb: str, version: Version, count: int) -> None:
        if version != self._version:
            raise WrongVersion(f"asked for {version}, this sampler holds {self._version}")
        self.num_prompts += count
        if self._fail_after is not None and self.num_prompts > self._fail_after:
            if self._dies:
                os._exit(1)
            raise EngineFailed(f"engine failed after {self._fail_after} prompts")
        await self._hang_if_due()
        now, seconds = time.monotonic(), count * self._seconds[verb]
        self._free_at = max(self._free_at, now) + seconds
        await asyncio.sleep(seconds if verb == "score" else self._free_at - now)

    async def _hang_if_due(self) -> None:
        if self.num_prompts > self._hang_after:
            self._hangs_since = min(self._hangs_since, time.monotonic())
            await _forever()

    def _begins(self, prompt: np.ndarray, answer: np.ndarray) -> bool:
        drawn = self._completion(prompt, SamplingSettings(0.0, 1.0, len(answer), ())).token_ids
        return np.array_equal(drawn, answer)

    def _completion(self, prompt: np.ndarray, settings: SamplingSettings) -> Completion:
        digest = hashlib.sha256(np.asarray(prompt, np.int32).tobytes()).digest()
        ids = np.resize(np.frombuffer(digest, np.uint8), min(self._answer_tokens, settings.max_new_tokens)).astype(np.int32)
        return Completion(self._version, ids, np.full(len(ids), -1.0, np.float32), "stop")


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()


class FakeFleet:
    """Several FakeSamplers in one process: as an actor it stands for more replicas than one machine can hold processes of."""

    def __init__(self, samplers: Sequence[FakeSampler]):
        self._samplers = samplers

    async def call(self, member: int, verb: str, *args: Any) -> Any:
        return await getattr(self._samplers[member], verb)(*args)


class FleetMember:
    """Stands where the handle of a sampler's actor is expected: `member.sample.remote(...)`."""

    def __init__(self, fleet: Any, member: int):
        for verb in ("ready", "sample", "score", "likelihood", "play", "load", "sleep", "wake", "stuck_s"):
            setattr(self, verb, _Verb(fleet, member, verb))
        self._fleet = fleet

    def end(self) -> None:
        """Its process, and with it the whole fleet."""
        ray.kill(self._fleet)


@dataclass(frozen=True)
class _Verb:
    fleet: Any
    """Actor handle of a FakeFleet."""
    member: int
    verb: str

    def remote(self, *args: Any) -> Any:
        return self.fleet.call.remote(self.member, self.verb, *args)
