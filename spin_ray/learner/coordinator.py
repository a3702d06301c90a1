"""The mailbox between the driver and the learner's workers: commands and blocks one way, results and metrics the other.

The learner lives through all iterations in ONE Ray Train `fit()`; its workers ask here what to do next. Ordering contract:

| who waits | for what | unblocked by |
|---|---|---|
| worker | command k | driver's `post` of command k |
| worker | block k of iteration t | driver's `put_block`, in any order |
| driver | result of command k | rank 0's `answer`, after every rank finished command k |
| all of them | | `fail`: every present and later wait raises the first error |

Back-pressure: none is needed. A block is a few megabytes of token ids in the object store (which spills by itself), and
the number of blocks of an iteration is known. Blocks of an iteration are dropped when the next one begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """Put in place of an answer when the other side has failed; the receiver raises it."""

    error: BaseException


class Coordinator:
    """An async actor with no CPU of its own. Plain class: its contract is tested without Ray."""

    def __init__(self) -> None:
        self._commands: list[Any] = []
        self._results: dict[int, Any] = {}
        self._blocks: dict[tuple[int, int], Any] = {}
        self._metrics: list[dict[str, Any]] = []
        self._failure: Failure | None = None
        self._changed = asyncio.Condition()

    async def post(self, command: Any) -> int:
        """Queue a command for all workers; returns its number."""
        async with self._changed:
            self._commands.append(command)
            self._changed.notify_all()
        return len(self._commands) - 1

    async def command(self, number: int) -> Any:
        """The command with this number, once it is posted."""
        return await self._wait(lambda: number < len(self._commands), lambda: self._commands[number])

    async def answer(self, number: int, result: Any) -> None:
        async with self._changed:
            self._results[number] = result
            self._changed.notify_all()

    async def result(self, number: int) -> Any:
        """The result of the command with this number, once rank 0 has answered; handed out once."""
        return await self._wait(lambda: number in self._results, lambda: self._results.pop(number))

    async def put_block(self, iteration: int, index: int, reference: Any) -> None:
        """Offer a finished block; `reference` is a list with one object reference (a bare one would be fetched here)."""
        async with self._changed:
            for key in [key for key in self._blocks if key[0] < iteration]:
                del self._blocks[key]
            self._blocks[iteration, index] = reference
            self._changed.notify_all()

    async def block(self, iteration: int, index: int) -> Any:
        """The block at this place of the iteration, once it is finished."""
        return await self._wait(lambda: (iteration, index) in self._blocks, lambda: self._blocks[iteration, index])

    async def log(self, metrics: dict[str, Any]) -> None:
        self._metrics.append(metrics)

    async def drain(self) -> list[dict[str, Any]]:
        """Metrics since the last call, in order."""
        metrics, self._metrics = self._metrics, []
        return metrics

    async def fail(self, error: BaseException) -> None:
        """End every wait with this error; only the first one counts."""
        async with self._changed:
            self._failure = self._failure or Failure(error)
            self._changed.notify_all()

    async def _wait(self, ready: Callable[[], bool], take: Callable[[], Any]) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or ready())
            return take() if ready() else self._failure
