"""All sampler replicas behind one door: prompts go to the least loaded one, weights to all.

One async actor with no CPU of its own; nothing but token ids and log-probs passes through it. Ordering contract:

| who waits | for what | unblocked by |
|---|---|---|
| a request of a later version | that version | `release`, after `load` |
| a request of the present version | a replica with room | answers of earlier requests; a replica that joins |
| `load` | the replicas | the last answer that the present version owes; evaluation that no replica has begun is put off |
| evaluation put off | its version | `load_again` |
| `load_again` | the replicas | the last answer that the present version owes; a newer `load`, over which it does nothing |
| a replica that joins late, or whose transfer failed | the present weights | its own load, or if they are lost the next `load` or `saved` |
| `sleep` | all replicas | the last one that starts, and the last answer that the present version owes |
| everything else, while they sleep; a replica that joins in place of another | the devices | `wake` |
| the heartbeat | a sign of life of a replica that owes something | the replica; or, past `heartbeat_timeout_s`, its new start |
| all of them | | too many failures in a row: every present and later wait raises the first error |

A replica that dies, whose engine fails or hangs, or that owes an answer for too long is started anew by Ray and brought to
the present weights; what it owed goes to whoever is free first. The heartbeat asks replicas that owe something; a load may take
its time as long as the process answers, a start has only its deadline. Requests are answered in the order of their `urgency`, then of
their `order` (a block's place in training: the one that the learner waits for goes first), then of their arrival; a request
of an earlier version is refused, unless it is evaluation, which waits until its version comes back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spin_ray.chat import ChatFormat
from spin_ray.config import Config, at
from spin_ray.errors import EngineFailed, TransferFailed, WeightsLost, WrongVersion, in_one_line
from spin_ray.placement import Hardware, beside_driver
from spin_ray.records import Completion, Devices, Likelihood, PublishedWeights, SamplingSettings, Saved, Span, Version
from spin_ray.sampler.actor import Sampler, SamplerArgs
from spin_ray.storage import DISK, Disk

AUDIT, PLAY, EVALUATE = 0, 1, 2
"""Urgency of a request: the audit is answered before its version is released, evaluation only fills what play leaves free."""
_ACTIVITY = {AUDIT: "audit", PLAY: "play", EVALUATE: "evaluate"}
CHUNK = 16
"""Prompts handed to a replica at a time: small, so that a long-tailed block spreads over all."""


def start_opponent(
    config: Config, saved: Saved, version: int, hardware: Hardware, *, max_model_len: int, logs: Path, storage: Disk = DISK,
    reloads: bool = True,
) -> tuple[Any, Fleet]:
    """Start the replicas with theta_version, which lies at `saved`. Returns at once, while they load: the pool's actor handle, and who
    starts more of them.

    `reloads` says whether they will have to take up other weights; a run that begins tries it first.
    """
    settings = {
        "tensor_parallel_size": config.sampler.tensor_parallel_size, "max_num_seqs": config.sampler.max_num_seqs,
        "trust_remote_code": config.model.trust_remote_code, **hardware.engine,
    }
    actor = ray.remote(
        num_cpus=config.sampler.cpus_per_replica, num_gpus=hardware.sampler_gpus, max_concurrency=10_000, max_restarts=-1,
        label_selector=dict(config.sampler.label_selector),
    )(Sampler)

    def start(replica: int) -> Any:
        return actor.remote(SamplerArgs(
            saved=saved, version=Version(version), dtype=hardware.dtype, max_model_len=max_model_len,
            seed=config.run.seed + 1000 * version + replica,  # a resumed run must not draw its first iteration's numbers again
            log_path=str(logs / f"sampler-{replica}.log"), engine=settings, env=hardware.sampler_env,
            storage=storage, try_reload=reloads and version == 0, weights=config.weights,
        ))

    sampler, fleet = config.sampler, Fleet(start)
    limits = Limits(
        sampler.max_num_seqs, sampler.request_timeout_s, sampler.max_restarts, sampler.restart_window_s,
        heartbeat_timeout_s=sampler.heartbeat_timeout_s or math.inf, bucket_timeout_s=config.weights.bucket_timeout_s,
    )
    return start_pool(fleet.more(sampler.fewest), Version(version), limits), fleet


class Fleet:
    """Starts replicas, each with a number of its own: `start(number)` -> actor handle."""

    def __init__(self, start: Callable[[int], Any]):
        self._start, self._numbers = start, itertools.count()

    def more(self, count: int) -> list[Any]:
        return [self._start(next(self._numbers)) for _ in range(count)]


def start_pool(samplers: Sequence[Any], version: Version, limits: Limits, end: Callable[[Any], None] = ray.kill) -> Any:
    """A pool of sampler actors (with max_restarts=-1) that hold `version` whenever they start; `end` ends one for good."""
    pool = ray.remote(**beside_driver(), max_concurrency=100_000)(SamplerPool).remote(list(samplers), version, limits, end=end)
    pool.start.remote()
    return pool


def sampling_settings(config: Config, chat: ChatFormat, iteration: int = 0) -> SamplingSettings:
    sampler = at(config.sampler, iteration)
    return SamplingSettings(sampler.temperature, sampler.top_p, sampler.max_new_tokens, tuple(sorted(chat.stop_ids)))


@dataclass(frozen=True)
class Limits:
    """What is asked of one replica, and when it counts as broken."""

    room: int
    """Prompts that it answers at the same time."""
    request_timeout_s: float = math.inf
    """Seconds after which an engine that owes an answer counts as hanging."""
    max_restarts: int = 0
    """Restarts, of all replicas together, that are put up with ..."""
    restart_window_s: float = 600.0
    """... within this many seconds."""
    heartbeat_timeout_s: float = math.inf
    """Seconds without a sign of life of a replica that owes something, or of its engine, after which it counts as hanging."""
    bucket_timeout_s: float = 0.0
    """Seconds that a bucket of new weights may take before the replica itself says that it is late."""


HEARTBEAT_S = 5.0
"""How often a replica is asked for a sign of life, if no shorter timeout asks for more."""


def restart_actor(handle: Any) -> None:
    """End the actor's process, whatever it is doing; Ray starts a new one in its place."""
    ray.kill(handle, no_restart=False)


@dataclass
class _Replica:
    number: int
    handle: Any
    version: Version
    weights: PublishedWeights | None = None
    """What it has loaded; None: what it started with."""
    joined: bool = False
    lives: int = 1
    """Counts its processes: what one of them owed says nothing about the next."""
    outstanding: int = 0
    """Prompts that it has not yet answered."""
    outstanding_tokens: int = 0
    """Tokens that it may still draw for them: an answer that is only scored costs it next to nothing beside one that it writes."""
    loading: bool = False
    leaving: bool = False
    """It gets no more work, and goes when it owes nothing."""
    needed: bool = True
    """Whether it is started anew where it fails; one that was added is not before it is up: it may find no place."""

    @property
    def name(self) -> str:
        return f"opponent {self.number}"


@dataclass(frozen=True)
class _Work:
    """Some prompts of one request, for one replica."""

    version: Version
    rank: tuple[int, int]
    """(urgency, order): what is smaller goes first."""
    size: int
    """Prompts."""
    tokens: int
    """Tokens that these take at most: one for each that is only scored."""
    call: Callable[[Any], Any]
    """(sampler handle) -> reference to the list of answers."""
    answers: asyncio.Future = field(compare=False)


class SamplerPool:
    """A plain class: its contract is tested with fake samplers, without Ray."""

    def __init__(
        self, samplers: Sequence[Any], version: Version, limits: Limits, restart: Callable[[Any], None] = restart_actor,
        end: Callable[[Any], None] = ray.kill,
    ):
        self._first_version, self._limits, self._restart, self._end = version, limits, restart, end
        self._failures: deque[tuple[float, BaseException]] = deque()
        """(when, error) of what led to restarts within the window."""
        self._failed_transfers: list[str] = []
        """Whom a sender could not bring the weights, and why; no failure, as such a replica fetches them."""
        self._num_restarts = 0
        self._replicas = [_Replica(number, handle, version) for number, handle in enumerate(samplers)]
        self._num_replicas = len(self._replicas)
        """All that there have ever been: a number is given once."""
        self._version = version
        self._newest = version
        """The last one that was asked for by `load`."""
        self._loads_waiting = 0
        """Calls of `load` that are not done: evaluation must not begin."""
        self._loading = asyncio.Lock()
        """One version at a time."""
        self._released = False
        self._asleep = False
        self._weights: PublishedWeights | None = None
        self._lost: WeightsLost | None = None
        """Why a replica that joins cannot have them."""
        self._waiting: list[tuple[tuple[int, int], int, _Work]] = []
        """A heap of (rank, arrival, work)."""
        self._arrivals = itertools.count()
        self._changed = asyncio.Condition()
        self._turned = asyncio.Condition()
        """For the hundreds of blocks that wait for their version: a change that is none of theirs does not wake them."""
        self._error: BaseException | None = None
        self._spans: deque[Span] = deque()
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Let every replica join as soon as it is up."""
        for replica in self._replicas:
            self._welcome(replica)

    def _welcome(self, replica: _Replica) -> None:
        self._spawn(self._join(replica))
        self._spawn(self._watch(replica))

    async def add(self, samplers: Sequence[Any]) -> None:
        """Replicas that started with the pool's first version; they join as soon as they are up, with the present weights."""
        for handle in samplers:
            self._replicas.append(_Replica(self._num_replicas, handle, self._first_version, needed=False))
            self._num_replicas += 1
            self._welcome(self._replicas[-1])

    async def retire(self, count: int) -> None:
        """Let so many replicas go, each when it owes nothing: first those that are not up yet, then those that owe least. One stays."""
        staying = sorted((r for r in self._replicas if not r.leaving), key=lambda r: (r.joined, r.outstanding_tokens, -r.number))
        for replica in staying[: max(0, min(count, len(staying) - 1))]:
            replica.leaving = True
        await self._note_change()

    async def size(self) -> tuple[int, int]:
        """How many replicas are up, and how many there are with those that start."""
        staying = [replica for replica in self._replicas if not replica.leaving]
        return sum(replica.joined for replica in staying), len(staying)

    def _see_off(self) -> None:
        """End those that leave and owe nothing."""
        for replica in [r for r in self._replicas if r.leaving and not r.outstanding and not r.loading]:
            self._replicas.remove(replica)
            replica.lives += 1  # what it still says counts no more
            self._end(replica.handle)

    async def ready(self, count: int = 1) -> int:
        """Wait until so many replicas are up; returns how many have joined."""
        await self._until(lambda: sum(replica.joined for replica in self._replicas) >= count)
        return sum(replica.joined for replica in self._replicas)

    async def sample(
        self, version: Version, prompts: Sequence[np.ndarray], settings: SamplingSettings, urgency: int = PLAY, order: int = 0
    ) -> list[Completion]:
        """One answer per prompt, in the prompts' order."""
        return await self._ask(
            version, (urgency, order), len(prompts), lambda part: lambda s: s.sample.remote(version, prompts[part], settings),
            tokens_each=settings.max_new_tokens,
        )

    async def score(
        self, version: Version, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], urgency: int = PLAY, order: int = 0
    ) -> list[np.ndarray]:
        """Log-probs of each given answer, [num_answer_tokens], in nats."""
        return await self._ask(
            version, (urgency, order), len(prompts), lambda part: lambda s: s.score.remote(version, prompts[part], answers[part]),
            tokens_each=1,
        )

    async def likelihood(
        self, version: Version, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], urgency: int = EVALUATE, order: int = 0
    ) -> list[Likelihood]:
        """What the version says of given continuations, one of each prompt."""
        return await self._ask(
            version, (urgency, order), len(prompts), lambda part: lambda s: s.likelihood.remote(version, prompts[part], answers[part]),
            tokens_each=1,
        )

    async def play(
        self, version: Version, prompts: Sequence[np.ndarray], settings: SamplingSettings, answers: Sequence[np.ndarray],
        urgency: int = PLAY, order: int = 0,
    ) -> list[tuple[Completion, np.ndarray]]:
        """Both by the same replica, for each prompt: an answer that it draws, and log-probs of a given one."""
        return await self._ask(
            version, (urgency, order), len(prompts), lambda part: lambda s: s.play.remote(version, prompts[part], settings, answers[part]),
            tokens_each=settings.max_new_tokens + 1,
        )

    async def load(self, weights: PublishedWeights) -> list[float]:
        """Once the present version owes no answer, every replica loads the new one; returns each one's seconds.

        Raises WeightsLost if they are gone; they may be published, and loaded, again.
        """
        self._newest = weights.version
        self._loads_waiting += 1
        try:
            await self._until(lambda: not self._owed())
            async with self._loading:
                self._released = False
                return await self._load_all(weights)
        finally:
            self._loads_waiting -= 1

    async def load_again(self, weights: PublishedWeights, present: Version) -> None:
        """Load what was loaded before, for the evaluation that was put off, or to go back; nothing if `present` is no longer the newest."""
        await self._until(lambda: present != self._newest or not self._owed())
        async with self._loading:
            if present == self._newest:
                await self._load_all(weights)

    async def _load_all(self, weights: PublishedWeights) -> list[float]:
        sender, fetched = weights.sender, dataclasses.replace(weights, sender=None)
        self._version, self._weights, self._lost = weights.version, fetched, None  # who joins is not sent to
        await self._note_change()
        loads = [self._spawn(self._load(replica, sender)) for replica in self._replicas if replica.joined and not replica.leaving]
        if loads:
            await asyncio.wait(loads)  # all of them, also if one fails: none may overtake a later load
        if sender is not None:
            self._end(sender)  # whatever it may hang in
        await self._note_change()
        return [load.result() for load in loads]

    async def saved(self, version: Version, at: Saved) -> None:
        """The present weights are on disk: who joins from here on reads them there, and the object store is free of them."""
        assert version == self._version and self._weights is not None
        self._weights, self._lost = dataclasses.replace(self._weights, buckets=(), saved_at=at), None
        await self._note_change()

    async def release(self, version: Version) -> None:
        """Let requests of the present version other than the audit's be answered."""
        assert version == self._version, f"{version} is not loaded, {self._version} is"
        self._released = True
        await self._note_change(turned=True)

    async def released(self, version: Version) -> None:
        """Wait until requests of this version are answered (or refused: it has gone by)."""
        await self._until(lambda: (self._released and version == self._version) or version.precedes(self._version), self._turned)

    async def sleep(self) -> Devices:
        """Once all replicas are up and owe nothing, have them free their devices, and return these; until `wake` nothing is answered, and
        no replica starts.
        """
        await self._until(lambda: not self._owed() and all(replica.joined for replica in self._replicas))
        async with self._loading:
            self._asleep = True
            return tuple(itertools.chain.from_iterable(await self._each("sleep")))

    async def wake(self) -> None:
        async with self._loading:
            await self._each("wake")
            self._asleep = False
        await self._note_change()

    async def _each(self, verb: str) -> list[Any]:
        """What the replicas that have joined answer; one that breaks is started anew."""

        async def ask(replica: _Replica) -> list[Any]:
            begin, life = time.time(), replica.lives
            try:
                answer = await asyncio.wait_for(_done(getattr(replica.handle, verb).remote()), self._limits.request_timeout_s)
            except BROKEN as error:
                self._start_anew(replica, life, error)
                return []
            self._spans.append(Span(replica.name, verb, self._version.number, begin, time.time()))
            return [answer]

        answers = await asyncio.gather(*(ask(replica) for replica in self._replicas if replica.joined))
        if self._error:
            raise self._error.with_traceback(None)
        return [answer for found in answers for answer in found]

    async def num_restarts(self) -> int:
        """Replicas started anew so far."""
        return self._num_restarts

    async def failed_transfers(self) -> list[str]:
        """Since the last call, of replicas that a sender could not bring the weights: which one and why."""
        failed, self._failed_transfers = self._failed_transfers, []
        return failed

    async def spans(self) -> list[Span]:
        """What the replicas have been busy with since the last call."""
        spans, self._spans = list(self._spans), deque()
        return spans

    async def _ask(
        self, version: Version, rank: tuple[int, int], count: int, call_of: Callable[[slice], Callable[[Any], Any]], *, tokens_each: int
    ) -> list[Any]:
        works = []
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            answers = asyncio.get_running_loop().create_future()
            works.append(_Work(version, rank, size, size * tokens_each, call_of(slice(start, start + size)), answers))
        for work in works:
            heapq.heappush(self._waiting, (rank, next(self._arrivals), work))
        self._dispatch()
        return [answer for work in works for answer in await work.answers]

    def _dispatch(self) -> None:
        """Give what may be answered to the least loaded replicas that have room."""
        kept = []
        while self._waiting:
            entry = heapq.heappop(self._waiting)
            work: _Work = entry[2]
            if self._error:
                work.answers.set_exception(self._error)
            elif work.version.precedes(self._version) and work.rank[0] != EVALUATE:
                work.answers.set_exception(WrongVersion(f"asked for {work.version}, the samplers are at {self._version}"))
            elif not self._may_answer(work):
                kept.append(entry)
            elif self._lost and not any(replica.joined for replica in self._replicas):
                work.answers.set_exception(self._lost)  # nobody has the present weights, and nobody can get them
            elif replica := self._least_loaded():
                replica.outstanding += work.size
                replica.outstanding_tokens += work.tokens
                self._spawn(self._answer(replica, work))
            else:
                kept.append(entry)
                break
        for entry in kept:
            heapq.heappush(self._waiting, entry)

    def _may_answer(self, work: _Work) -> bool:
        if work.rank[0] == EVALUATE and self._loads_waiting:
            return False  # put off
        return not self._asleep and work.version == self._version and (self._released or work.rank[0] == AUDIT)

    def _least_loaded(self) -> _Replica | None:
        room = self._limits.room + CHUNK
        free = [r for r in self._replicas if r.joined and not r.leaving and r.version == self._version and r.outstanding < room]
        return min(free, key=lambda replica: (replica.outstanding_tokens, replica.outstanding), default=None)

    async def _answer(self, replica: _Replica, work: _Work) -> None:
        begin, life = time.time(), replica.lives
        try:
            work.answers.set_result(await asyncio.wait_for(_done(work.call(replica.handle)), self._limits.request_timeout_s))
        except BROKEN as error:
            heapq.heappush(self._waiting, (work.rank, next(self._arrivals), work))
            self._start_anew(replica, life, error)
        except Exception as error:  # the request's own fault; it reaches whoever asked
            work.answers.set_exception(error)
        replica.outstanding -= work.size
        replica.outstanding_tokens -= work.tokens
        self._spans.append(Span(replica.name, _ACTIVITY[work.rank[0]], work.version.number, begin, time.time()))
        await self._note_change()

    async def _watch(self, replica: _Replica) -> None:
        """The heartbeat: an engine that hangs is noticed long before the deadline of what it owes."""
        limit = self._limits.heartbeat_timeout_s
        while self._error is None and limit < math.inf and replica in self._replicas:
            await asyncio.sleep(min(HEARTBEAT_S, limit / 4))
            if not (replica.loading or (replica.joined and replica.outstanding)):
                continue
            life, loading = replica.lives, replica.loading
            try:
                stuck_s = await asyncio.wait_for(_done(replica.handle.stuck_s.remote()), limit)
                if stuck_s > limit and not loading:
                    raise EngineFailed(f"hung: its engine was at one step for longer than sampler.heartbeat_timeout_s={limit:g}")
            except TimeoutError:
                silent = EngineFailed(f"hung: no sign of life for sampler.heartbeat_timeout_s={limit:g}")
                self._start_anew(replica, life, silent)
            except BROKEN as error:
                self._start_anew(replica, life, error)
            await self._note_change()

    def _start_anew(self, replica: _Replica, life: int, error: BaseException) -> None:
        """Have a broken replica join again; the first of its requests to fail sees to it."""
        if life != replica.lives:
            return
        if replica.leaving or not replica.needed:
            replica.leaving = True  # it goes in any case, or has found no place
            return
        replica.joined, replica.loading = False, False
        replica.version, replica.weights = self._first_version, None
        replica.lives, now = replica.lives + 1, time.monotonic()
        if isinstance(error, TransferFailed):
            self._failed_transfers.append(f"sampler {replica.number}: {_said_by(error)}")
        else:
            self._failures.append((now, _in_words(replica, error)))
        while self._failures and now - self._failures[0][0] > self._limits.restart_window_s:
            self._failures.popleft()
        if not isinstance(error, ray.exceptions.RayActorError):  # a dead one is being started anew already
            self._restart(replica.handle)  # also when it is the last time: who waits for what hangs in it must hear of it
        if len(self._failures) > self._limits.max_restarts:
            self._error = self._error or self._failures[0][1]
            return
        self._num_restarts += 1
        self._spawn(self._join(replica))

    async def _join(self, replica: _Replica) -> None:
        """Bring a replica that starts to the present weights, whatever was loaded meanwhile."""
        life = replica.lives
        try:
            await self._until(lambda: not self._asleep)
            await asyncio.wait_for(_up(replica.handle), self._limits.request_timeout_s)
            while replica.weights is not (weights := self._weights) and life == replica.lives and not replica.leaving:
                try:
                    await self._load(replica)
                except WeightsLost as error:
                    self._lost = error
                    await self._note_change()
                    await self._until(lambda: self._weights is not weights)
            if life == replica.lives:
                replica.joined, replica.needed = True, True
        except BROKEN as error:
            self._start_anew(replica, life, error)
        except Exception as error:  # raised again wherever somebody waits for an answer
            self._error = self._error or error
        await self._note_change()

    async def _load(self, replica: _Replica, sender: Any = None) -> float:
        weights, begin, life = self._weights, time.time(), replica.lives
        assert weights is not None
        replica.loading = True
        limit = self._limits.request_timeout_s + len(weights.buckets) * self._limits.bucket_timeout_s
        try:
            asked = replica.handle.load.remote(dataclasses.replace(weights, sender=sender))
            seconds = await asyncio.wait_for(_done(asked), limit)
        except BROKEN as error:
            self._start_anew(replica, life, error)
            return 0.0
        finally:
            replica.loading = replica.loading and life != replica.lives
        if life == replica.lives:
            replica.version, replica.weights = weights.version, weights
            self._spans.append(Span(replica.name, "load", weights.version.number, begin, time.time()))
        return seconds

    def _owed(self) -> bool:
        """Whether the present version has still to answer something."""
        return any(replica.outstanding for replica in self._replicas) or any(self._may_answer(work) for *_, work in self._waiting)

    async def _note_change(self, *, turned: bool = False) -> None:
        self._see_off()
        async with self._changed:
            self._dispatch()
            self._changed.notify_all()
        if turned or self._error:
            async with self._turned:
                self._turned.notify_all()

    async def _until(self, condition: Callable[[], bool], changed: asyncio.Condition | None = None) -> None:
        changed = changed or self._changed
        async with changed:
            await changed.wait_for(lambda: self._error is not None or condition())
        if self._error:
            raise self._error.with_traceback(None)

    def _spawn(self, coroutine: Any) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task


BROKEN = (EngineFailed, ray.exceptions.RayActorError, TimeoutError)
"""What says that a replica is broken, not the request."""


async def _done(reference: Any) -> Any:
    return await reference


async def _up(handle: Any) -> None:
    """Wait until an actor answers, also while Ray is still starting it anew."""
    while True:
        try:
            return await handle.ready.remote()
        except ray.exceptions.ActorUnavailableError:
            await asyncio.sleep(0.5)


def _in_words(replica: _Replica, error: BaseException) -> EngineFailed:
    """For the user, if this is one failure too many."""
    if isinstance(error, TimeoutError):
        what = "hung: it owed an answer for longer than sampler.request_timeout_s"
    elif isinstance(error, ray.exceptions.RayActorError):
        what = f"died: {in_one_line(error)}"
    else:
        what = _said_by(error)
    return EngineFailed(f"sampler {replica.number}: {what}; see logs/sampler-{replica.number}.log, and sampler.max_restarts")


def _said_by(error: BaseException) -> str:
    """Without Ray's traceback, where it came from another process."""
    return str(getattr(error, "cause", error))
