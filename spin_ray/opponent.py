"""The driver's side of the opponent: what it plays, with which weights, and when. The main player's is learner/group.py.

A method that plays nothing has one too, as long as something is evaluated; `Bystander` stands where there is none at all.

    Version(t) ──► load ──► audit ──► (selfplay marks it) ──► release ──┬─► plays iteration t ──► evaluated, with what time is left
                                                                        └─► `lookahead`: load of a snapshot of t + 1 ──► plays ahead

| who waits | for what | where |
|---|---|---|
| `load` | all that earlier weights have to play; evaluations that were put off before | `Overlap`, `Evaluations.make_way`, the pool |
| the audit | nothing: the pool answers it before it answers the play | `AUDIT` in sampler/pool.py |
| the play of a version | `release`, behind the audit | the pool |
| a snapshot's load | iteration t played; a rollback of the training that made it, which voids it | `_take_snapshot` |
| all of them | the first error of any thread | `Threads` |
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from spin_ray.background import Threads, in_background
from spin_ray.config import Config
from spin_ray.errors import RunStopped, WeightsLate, WeightsLost
from spin_ray.evaluation import Evaluations
from spin_ray.exchange.audit import Audit, compare
from spin_ray.exchange.pairs import Played, PlayPlan, Stored, StoredRows, play, read_pairs
from spin_ray.guard import FirstAnswers
from spin_ray.learner.group import Learner
from spin_ray.learner.messages import Publish, Score
from spin_ray.manifest import RunDir
from spin_ray.methods import Method
from spin_ray.model import ModelFacts
from spin_ray.overlap import Overlap
from spin_ray.placement import Hardware
from spin_ray.records import Devices, Prompt, PublishedWeights, Saved, Span, Version, real_only
from spin_ray.reporting import Reporting
from spin_ray.sampler.pool import AUDIT, Fleet, sampling_settings
from spin_ray.scaling import Scaler
from spin_ray.system import Neighbours, let_learner_go_first
from spin_ray.theta import Thetas

if TYPE_CHECKING:
    from spin_ray.tasks.harness import Tasks


class Opponent:
    """All versions of it, one after the other, in one pool of samplers.

    The main thread loads, audits and releases theta_t; one thread hands on what is played, iteration after iteration; evaluations
    and snapshots have short-lived threads of their own.
    """

    def __init__(
        self, config: Config, method: Method, thetas: Thetas, facts: ModelFacts, hardware: Hardware, pool: Any, fleet: Fleet | None,
        learner: Learner, overlap: Overlap, threads: Threads, reporting: Reporting, *, first: Sequence[Prompt], heldout: Sequence[Prompt],
        tasks: Tasks | None = None,
    ):
        """`first`: of the training prompts, for the audit. `learner` gives snapshots, takes blocks; `fleet` starts replicas."""
        self._config, self._method, self._run, self._hardware, self._pool, self._fleet = config, method, thetas.run, hardware, pool, fleet
        self._learner, self._overlap, self._threads, self._reporting = learner, overlap, threads, reporting
        self._settings = tuple(sampling_settings(config, facts.chat, t) for t in range(method.num_iterations))
        self._is_evaluated = bool(heldout or tasks)
        self._audited = first[: config.audit.num_prompts]
        self._first_answers = FirstAnswers(config, facts.chat)
        self._evaluations = Evaluations(config, method, thetas, facts, heldout, pool, overlap, threads, reporting, tasks)
        self._written: dict[int, list[Played]] = defaultdict(list)
        """Iteration -> its new blocks that are finished, in their order."""
        self._snapshots_used: set[int] = set()
        """Iterations whose training has a snapshot that played ahead."""
        self._num_voided = 0
        """Trainings that were rolled back, and their snapshots with them."""
        self._taking = threading.Lock()
        """A snapshot is taken before a rollback or after it."""
        self._neighbours = Neighbours()
        self.devices: Devices = ()
        """The samplers' when they last went to sleep."""
        self._released: int | None = None
        """The newest version that plays."""
        self._weights: PublishedWeights | None = None
        """What the samplers hold, if it came from the learner."""
        self._scaler, sampler = None, config.sampler
        if sampler.is_elastic and not overlap.waits_for_all:  # where the main player waits for all, nothing is hidden
            self._scaler = Scaler(sampler.fewest, sampler.most, size=lambda: self._ask("size"), change=self._resize)

    def start(self) -> None:
        """Start the play of all iterations: its pipeline starts up while the engines do. Returns when a sampler is up, or where the
        players take turns all of them.
        """
        if self._method.plays:
            self._threads.start(self._play)
        else:
            self._threads.start(hand_on_rows, self._method, self._run, self._overlap, self._learner)
        number, first = self._config.sampler.fewest, not self._hardware.takes_turns
        ready = self._pool.ready.remote(1 if first else number).future()
        who = f"the first of {number} samplers" if first else f"{number} samplers"
        self._reporting.wait_for(ready, self._threads, who, f"{self._run.logs}/sampler-0.log")

    def _play(self) -> None:
        """Lines 3-5: theta_t answers every prompt. Hands every block on as soon as it is finished."""
        plan = PlayPlan(
            self._run, self._pool, self._settings, score=self._method.scorer == "opponent",
            max_steps_early=self._overlap.max_steps_early, anchored=self._method.anchored,
        )
        blocks = [block for t in range(self._overlap.first, self._method.num_iterations) for block in self._overlap.blocks(t)]
        storage = self._run.storage
        for block, played in play(plan, blocks, self._hardware.blocks_in_flight):
            t, path = block.iteration, self._run.pairs(block.iteration, block.kind, block.index)
            if not block.age:
                self._written[t].append(played)
            self._reporting.play_begins(t)
            self._learner.put_block(t, block.place, Stored(path, storage))
            self._overlap.block_played(block)
            if not block.age and self._first_answers.wanted(t):
                shares = self._first_answers.look(t, read_pairs(path, storage), storage.name(path))
                if shares:
                    self._reporting.tracker.log("sampler", shares, iteration=t, opponent_version=t)
            self._reporting.played(block, played, path)
            if self._scaler:
                new, replayed = self._overlap.num_pairs(t)
                self._scaler.played(played.num_pairs, replayed=bool(block.age), new_in_all=new, replayed_in_all=replayed)

    def _resize(self, difference: int, need: float) -> None:
        """So many samplers more, or fewer."""
        if difference > 0:
            self._ask("add", self._fleet.more(difference))
        else:
            self._ask("retire", -difference)
        self._reporting.resized(self._ask("size")[1], need, self._released)

    def stepped(self, pairs_per_s: float) -> None:
        """The main player has taken a step."""
        if self._scaler:
            self._scaler.trained(pairs_per_s)

    def asks(self, version: int) -> list[Publish | Score]:
        """What the learner is to do, in this order, before theta_version can be the opponent. The first one samplers load themselves."""
        return [*([] if version == self._overlap.first else [Publish(Version(version))]), self._probe()]

    def become(self, version: int, answers: Iterator[Any], on_disk: Callable[[], Saved]) -> Audit:
        """theta_version is the opponent: loaded and audited. `answers`: the learner's to `asks`; `on_disk`: waits until the same weights
        are in the run directory. Raises WeightsLost, AuditError.
        """
        if version == self._overlap.first:
            log = f"{self._run.logs}/learner-0.log"
            probed = self._reporting.wait_for(in_background(next, answers), self._threads, "the main player", log)
        else:
            published, probe = next(answers), cache(lambda: next(answers))
            try:
                return self._take_up(version, published, probe)
            except WeightsLate as error:  # what is lost is published again by the next group
                self._reporting.weights_late(error)
                return self._take_up(version, replace(published, buckets=(), saved_at=on_disk(), sender=None), probe)
        return self._audit(version, probed)

    def _take_up(self, version: int, weights: PublishedWeights, probe: Callable[[], Sequence[np.ndarray]]) -> Audit:
        self._weights = weights
        self.load(weights)
        return self._audit(version, probe())

    def load(self, weights: PublishedWeights) -> None:
        """Bring new weights to the samplers, once they owe nothing under the old ones. Raises WeightsLost."""
        self._overlap.wait_until_may_load(weights.version)
        self._evaluations.make_way(weights.version)
        begun = time.monotonic()
        seconds = max(self._ask("load", weights), default=0.0)
        metrics = {"load_s": seconds, "total_s": time.monotonic() - begun, "from_run_dir": float(weights.saved_at is not None)}
        if seconds:  # else no replica has them yet
            metrics["gib_per_s"] = weights.num_bytes / 2**30 / seconds
        if weights.sender:
            metrics["num_failed_transfers"] = self._reporting.fell_back(self._ask("failed_transfers"))
        self._reporting.tracker.log("sync", metrics, opponent_version=weights.version.number)

    def _probe(self) -> Score:
        """What the learner is to score for the audit."""
        return Score(tuple(real_only(prompt, self._overlap.first) for prompt in self._audited))

    def _audit(self, version: int, probed: Sequence[np.ndarray]) -> Audit:
        """Sampler and learner score the same real answers; `probed` is what the learner answered to `_probe`. Raises AuditError."""
        questions, answers = [p.prompt_ids for p in self._audited], [p.real_ids for p in self._audited]
        scored = self._ask("score", Version(version), questions, answers, AUDIT)
        audit = compare(version, scored, probed[::2], self._hardware.audit_tolerance)
        metrics = {"mean_abs_logp_difference_nats": audit.mean_nats, "max_abs_logp_difference_nats": audit.max_nats}
        self._reporting.tracker.log("audit", metrics, opponent_version=version)
        return audit

    def made(self, t: int) -> dict[str, Any]:
        """What the manifest is to remember of the pairs that theta_t wrote, all of them."""
        if not self._method.plays:
            return {}
        sha256 = hashlib.sha256(b"".join(played.sha256 for played in self._written[t])).hexdigest()
        pairs = {"new": sum(played.num_pairs for played in self._written[t]), "sha256": sha256}
        return {"pairs": pairs, "sampling": asdict(self._settings[t])}

    def saved(self, at: Saved) -> dict[str, Any]:
        """What the samplers hold is on disk: the object store is free of it, and it may be loaded from there again. Returns what the
        manifest is to remember of it.
        """
        self._evaluations.tied_names = self._weights.tied_names
        self._ask("saved", self._weights.version, at)
        return {"tied_names": dict(self._weights.tied_names)}

    def evaluate_the_one_before(self, version: int) -> None:
        """theta_{version-1}'s evaluation, put off when the session before ended, or seen by a guard that ended it."""
        if version and self._is_evaluated:
            self._evaluations.start(version - 1, {})

    def release(self, version: int, trained: dict[str, Any]) -> None:
        """theta_version may play, and be evaluated in what time the play leaves; `trained` goes into its row of the table."""
        self._open(Version(version))
        self._released = version
        if self._hardware.learner_first and not self._neighbours.crowd():
            let_learner_go_first()  # every time: processes come and go
        self._evaluations.start(version, trained)
        if early := self._overlap.snapshot(version):
            played = [self._run.has_pairs(b.iteration, b.kind, b.index) for b in self._overlap.blocks_ahead(version + 1)]
            if any(played):
                self._snapshots_used.add(version)
            if not all(played):
                self._threads.start(self._play_ahead, early[1])

    def _open(self, version: Version) -> None:
        if self._scaler:
            self._scaler.opened()
        if version.number < self._method.num_iterations:
            self._reporting.play_begins(version.number)
        self._ask("release", version)

    def _play_ahead(self, version: Version) -> None:
        """`lookahead`: a snapshot of the main player opens the next iteration while this one is still trained on."""
        loaded = False
        while not loaded:
            group = self._learner.group()
            weights = self._take_snapshot(version)
            try:
                self.load(weights)
                loaded = True
            except WeightsLost as error:
                if isinstance(error, WeightsLate) and group == self._learner.group():
                    raise RunStopped(f"{error}; a snapshot lies nowhere else: mend the line, then the same command goes on") from error
                self._learner.wait_for_group_after(group)
        self._open(version)

    def _take_snapshot(self, version: Version) -> PublishedWeights:
        """What the training that goes on has published, not one that was rolled back meanwhile."""
        while True:
            num_voided = self._num_voided
            weights = self._learner.result(version)
            with self._taking:
                if num_voided == self._num_voided:
                    self._snapshots_used.add(version.number - 1)
                    return weights

    @contextmanager
    def voiding_snapshot(self, t: int, step: int) -> Iterator[bool]:
        """While iteration t's training, at `step`, may be rolled back: whether its snapshot may have played already."""
        early = self._overlap.snapshot(t)
        with self._taking:
            yield t in self._snapshots_used or (early is not None and step >= early[0])
            self._num_voided += 1

    def rest(self) -> None:
        """After what the newest version owes: its iteration's play, and its evaluation."""
        if self._released is not None:
            self._overlap.wait_until_may_evaluate(self._released)
            self._evaluations.wait(self._released)
        self.devices = self._ask("sleep")

    def wake(self) -> None:
        self._ask("wake")

    def num_restarts(self) -> int:
        return self._ask("num_restarts")

    def spans(self) -> list[Span]:
        """What the replicas have been busy with since the last call."""
        return self._pool.spans.remote().future().result()  # also where the run has failed

    def _ask(self, verb: str, *args: Any) -> Any:
        """The pool's answer, or the first error of any thread."""
        return self._threads.result(getattr(self._pool, verb).remote(*args).future())


class Bystander:
    """Has the verbs of `Opponent` where rows are the pairs and nothing is evaluated: no sampler is there."""

    def __init__(
        self, method: Method, run: RunDir, learner: Learner, overlap: Overlap, threads: Threads, reporting: Reporting,
    ):
        self._method, self._run, self._learner, self._overlap, self._threads = method, run, learner, overlap, threads
        self._reporting = reporting

    def start(self) -> None:
        self._threads.start(hand_on_rows, self._method, self._run, self._overlap, self._learner)

    def asks(self, version: int) -> list[Publish | Score]:
        return []

    def become(self, version: int, answers: Iterator[Any], on_disk: Callable[[], Saved]) -> None:
        """Nothing is loaded, and there is nothing to compare with."""

    def made(self, t: int) -> dict[str, Any]:
        return {}

    def saved(self, at: Saved) -> dict[str, Any]:
        return {}

    def evaluate_the_one_before(self, version: int) -> None:
        """There is nothing to evaluate on."""

    def release(self, version: int, trained: dict[str, Any]) -> None:
        self._reporting.row(version, {}, trained)

    @contextmanager
    def voiding_snapshot(self, t: int, step: int) -> Iterator[bool]:
        yield False

    def stepped(self, pairs_per_s: float) -> None:
        """Nothing is to be kept up with."""

    def num_restarts(self) -> int:
        return 0

    def spans(self) -> list[Span]:
        return []


def hand_on_rows(method: Method, run: RunDir, overlap: Overlap, learner: Learner) -> None:
    """Give the learner the pairs that the rows are, block by block."""
    for t in range(overlap.first, method.num_iterations):
        for block in overlap.blocks(t):
            learner.put_block(t, block.place, StoredRows(run.prompts(block.index), run.storage, method))
            overlap.block_played(block)
