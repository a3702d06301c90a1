"""Who asks the pool and the coordinator while they are measured, as processes of their own. Loads no more than it needs."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from spin_ray.learner.messages import StepRecord
from spin_ray.records import SamplingSettings, Version

TOKENS = 256
"""Of a prompt, and of an answer."""
SETTINGS = SamplingSettings(1.0, 1.0, TOKENS, ())
METRICS = {
    **dict.fromkeys(("loss", "pair_loss", "expected_pair_loss", "margin", "grad_norm", "lr", "accuracy", "real_logp_change_nats"), 0.5),
    **dict.fromkeys(("generated_logp_change_nats", "num_tokens", "pairs_per_s", "tokens_per_s", "waited_s", "stale_share"), 1.0),
    **dict.fromkeys(("max_staleness_steps", "real_tokens", "generated_tokens", "same_as_real_share", "truncated_share"), 2.0),
}
"""As many as a real step has."""


class Asker:
    """Asks the pool as the processes of the play pipeline do."""

    def __init__(self, pool: Any):
        self._pool = pool

    async def ask(self, verb: str, prompts: int, count: int, in_flight: int) -> None:
        """So many requests, of so many prompts each."""
        gate, ids = asyncio.Semaphore(in_flight), [np.arange(TOKENS, dtype=np.int32) for _ in range(prompts)]
        arguments = {"play": (ids, SETTINGS, ids), "sample": (ids, SETTINGS), "score": (ids, ids)}[verb]

        async def one() -> None:
            async with gate:
                await self._pool.released.remote(Version(0))
                await getattr(self._pool, verb).remote(Version(0), *arguments)

        await asyncio.gather(*(one() for _ in range(count)))


class Ranks:
    """Some of the learner's ranks: ask the coordinator as each of them does."""

    async def ready(self) -> None:
        pass

    async def read(self, coordinator: Any, ranks: int, blocks: int) -> None:
        """Each fetches where every block lies."""

        async def one() -> None:
            place = 0
            while place < blocks:
                references = await coordinator.blocks.remote(0, place)
                await asyncio.gather(*references)
                place += len(references)

        await asyncio.gather(*(one() for _ in range(ranks)))

    async def follow(self, coordinator: Any, ranks: int, commands: int) -> None:
        """Each fetches every command."""

        async def one() -> None:
            for number in range(commands):
                await (await coordinator.command.remote(number))[0]

        await asyncio.gather(*(one() for _ in range(ranks)))

    async def report(self, coordinator: Any, steps: int) -> None:
        """One of them tells of its steps."""
        for step in range(steps):
            await coordinator.log.remote(StepRecord(0, step, steps, METRICS, 1))
