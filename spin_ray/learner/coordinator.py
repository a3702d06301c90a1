"""The mailbox between the driver and the learner's workers: commands and blocks one way, results and metrics the other.

The learner lives through all iterations in ONE Ray Train `fit()`; its workers ask here what to do next. Ordering contract:

| who waits | for what | unblocked by |
|---|---|---|
| worker | command k | driver's `post` of command k |
| worker | block k of iteration t | driver's `put_block`, in any order |
| worker before it joins, or after it has given its devices away | its turn | `let_in` |
| a new group of workers, before it joins | what the present one wrote to be in its place | `let_go` |
| worker whose step diverged | the driver's decision | `roll_back`, or `fail` |
| driver | result of command k, or what it announced under another key | rank 0's `answer` |
| driver | a new group of workers, after what the last one published is lost | its `join` |
| driver, whatever else it waits for | a failure | `fail` |
| all of them | | `fail`: every present and later wait raises the first error |

Whether a report is acted on, and when, says reports.py. A worker that dies takes its group with it; Ray Train starts a new one,
which joins at the base and carries out all commands from there again. Their results come again under the same keys. A group that is
rolled back ends in the same way; only deaths count against `max_restarts`, past which the run ends with the first one's cause.

Back-pressure: none is needed. A block is a few megabytes of token ids in the object store (which spills by itself), and
the number of blocks of an iteration is known. When the base moves, everything that lies before it is dropped: commands,
results (published weights among them) and blocks.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from spin_ray.errors import RunStopped
from spin_ray.learner.messages import StepRecord, Wish
from spin_ray.records import Saved, Version


@dataclass(frozen=True)
class Failure:
    """Put in place of an answer when the other side has failed; the receiver raises it."""

    error: BaseException


@dataclass(frozen=True)
class Base:
    """Where a group of workers starts: theta_t, and the command that trains it."""

    saved: Saved
    checkpoint_path: str | None
    """DeepSpeed checkpoint of the same weights, for the fp32 masters of a bf16 run."""
    first_command: int = 0
    iteration: int = 0
    """Whose pairs that command trains on; nobody asks for earlier ones again."""


@dataclass(frozen=True)
class Joined:
    """What a new group of workers is told."""

    base: Base
    group: int
    """Its number, from 1 on."""
    rollbacks: int
    """Of the whole run so far."""


class Coordinator:
    """An async actor with no CPU of its own. Plain class: its contract is tested without Ray."""

    def __init__(self, base: Base, *, max_restarts: int = 0, rollbacks: int = 0, at_rest: bool = False) -> None:
        self._base = base
        self._at_rest = at_rest
        """Somebody else holds the devices."""
        self._group = 0
        self._max_restarts, self._deaths = max_restarts, 0
        self._first_death = ""
        self._rollbacks = rollbacks
        self._spoilt: set[int] = set()
        """Groups that are to be rolled back, ..."""
        self._ending = False
        """... and whether the present one has yet to end for it."""
        self._interrupted = False
        self._held = False
        """What the present group wrote is being put in its place."""
        self._may_grow = False
        """There is room for a larger group than the present one."""
        self._training = -1
        """The iteration of the last step that was heard of."""
        self._commands: dict[int, Any] = {}
        self._num_commands = 0
        self._results: dict[int | Version, Any] = {}
        self._blocks: dict[tuple[int, int], Any] = {}
        self._records: list[Any] = []
        self._failure: Failure | None = None
        self._changed = asyncio.Condition()

    async def post(self, command: Any) -> int:
        """Queue a command for all workers; returns its number. `command` is a reference in a list, as in `put_block`: a loss
        function unpickled here would bring torch along.
        """
        async with self._changed:
            number, self._num_commands = self._num_commands, self._num_commands + 1
            self._commands[number] = command
            self._changed.notify_all()
        return number

    async def turn(self) -> Any:
        """Wait until the workers may use their devices."""
        return await self._wait(lambda: not self._at_rest, lambda: None)

    async def give_away(self, number: int, result: Any, group: int) -> None:
        """The workers' devices are free: leave the result of the command that asked for it. No later group carries it out again."""
        async with self._changed:
            if group == self._group:
                self._at_rest, self._results[number], self._commands[number] = True, result, None
                self._changed.notify_all()

    async def let_in(self) -> None:
        """It is the workers' turn."""
        async with self._changed:
            self._at_rest = False
            self._changed.notify_all()

    async def command(self, number: int) -> Any:
        """What was posted under this number, once it is; None: it is done with."""
        return await self._wait(lambda: number in self._commands, lambda: self._commands[number])

    async def answer(self, key: int | Version, result: Any, group: int | None = None) -> None:
        """Leave the result of a command under its number, or a snapshot under its version; that of a replaced group is dropped."""
        async with self._changed:
            if group in (None, self._group):
                self._results[key] = result
                self._changed.notify_all()

    async def result(self, key: int | Version) -> Any:
        """What rank 0 left under this key, once it is there."""
        return await self._wait(lambda: key in self._results, lambda: self._results[key])

    async def join(self) -> Joined | Failure:
        """Called once by every new group of workers: where to start. Answers of an earlier group from there on no longer count."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._held or self._failure is not None)
            self._group += 1
            self._results, self._ending, self._may_grow = {}, False, False
            self._changed.notify_all()
        return self._failure or Joined(self._base, self._group, self._rollbacks)

    async def group(self) -> int:
        """How many groups of workers have joined."""
        return self._group

    async def group_after(self, group: int) -> Any:
        """The number of groups, once it is larger than this."""
        return await self._wait(lambda: self._group > group, lambda: self._group)

    async def hold(self, group: int) -> bool:
        """Let no new group join, and write over what `group` wrote, until `let_go`; False if one has joined since."""
        self._held = group == self._group
        return self._held

    async def let_go(self) -> None:
        """A new group may join."""
        async with self._changed:
            self._held = False
            self._changed.notify_all()

    async def move_base(self, base: Base, group: int) -> bool:
        """Let later groups start from `base`, if `group` is still the one that made it; False: another has joined."""
        if group != self._group:
            return False
        self._base = base
        self._commands = {number: command for number, command in self._commands.items() if number >= base.first_command}
        self._results = {key: value for key, value in self._results.items() if not _lies_before(base, key)}
        self._blocks = {key: value for key, value in self._blocks.items() if key[0] >= base.iteration}
        return True

    async def rolled_back(self, group: int) -> None:
        """Wait until the driver has decided that this group's training starts over."""
        return await self._wait(lambda: group in self._spoilt, lambda: None)

    async def roll_back(self, group: int) -> bool:
        """Let this group of workers end and a new one start over from the base; False if it has been replaced already."""
        if group != self._group:
            return False
        async with self._changed:
            self._rollbacks, self._ending = self._rollbacks + 1, True
            self._results = {}  # a snapshot of the spoilt training among them
            self._spoilt.add(group)
            self._changed.notify_all()
        return True

    async def group_ended(self, cause: str) -> None:
        """Ray Train has lost a group of workers, and starts a new one: it was rolled back, a larger one follows, or one of them died."""
        if self._ending:
            self._ending = False
            return
        self._deaths += 1
        self._first_death = self._first_death or cause
        if self._deaths > self._max_restarts:
            allowed = f"learner.max_restarts={self._max_restarts} allows"
            await self.fail(Failure(RunStopped(f"workers of the main player failed more often than {allowed}; first {self._first_death}")))

    async def put_block(self, iteration: int, index: int, reference: Any) -> None:
        """Offer a finished block; `reference` is a list with one object reference (a bare one would be fetched here)."""
        async with self._changed:
            self._blocks[iteration, index] = reference
            self._changed.notify_all()

    async def blocks(self, iteration: int, start: int) -> Any:
        """References to all finished blocks from place `start` of the iteration on, at least that one, without a gap."""

        def take() -> list[Any]:
            places = itertools.takewhile(lambda place: (iteration, place) in self._blocks, itertools.count(start))
            return [reference for place in places for reference in self._blocks[iteration, place]]

        return await self._wait(lambda: (iteration, start) in self._blocks, take)

    async def log(self, record: Any) -> Wish:
        """Pass a StepRecord or a Span on to the driver; returns what is wanted of the workers."""
        self._records.append(record)
        if isinstance(record, StepRecord):
            self._training = record.iteration
        at_base = self._training == self._base.iteration  # the progress of a later iteration would be lost with its theta
        return Wish(self._interrupted, self._base.iteration if self._may_grow and at_base else None)

    async def make_room(self) -> None:
        """A larger group of workers would fit: let the present one end when its progress can be saved."""
        self._may_grow = True

    async def growing(self, group: int) -> None:
        """This group's progress is saved, and it ends for a larger one: no death."""
        self._ending = self._ending or group == self._group

    async def interrupt(self) -> None:
        """Ask the training under way to save its progress and end."""
        self._interrupted = True

    async def drain(self) -> list[Any]:
        """Records since the last call, in order."""
        records, self._records = self._records, []
        return records

    async def now(self) -> float:
        """The driver's host's clock, in seconds since the epoch: all spans of a run are by it."""
        return time.time()

    async def fail(self, failure: Failure) -> None:
        """End every wait with this error; only the first one counts. (A bare error of Ray's own would fail this call instead.)"""
        async with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    async def failure(self) -> Failure:
        """The first error, once there is one."""
        return await self._wait(lambda: False, lambda: None)

    async def _wait(self, ready: Callable[[], bool], take: Callable[[], Any]) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or ready())
            return take() if ready() else self._failure


def _lies_before(base: Base, key: int | Version) -> bool:
    """Whether nobody asks for this result again: its command, or the version that it was announced as, is done with."""
    return key.number <= base.iteration if isinstance(key, Version) else key < base.first_command


class DriverFailed(Exception):
    """The other side has failed; it knows why."""


def unwrapped(reference: Any) -> Any:
    """What a worker asked the coordinator for. Raises DriverFailed if it got a Failure instead."""
    value = ray.get(reference)
    if isinstance(value, Failure):
        raise DriverFailed
    return value
