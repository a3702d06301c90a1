"""Self-play fine-tuning: the loop of Algorithm 1 (arXiv 2401.01335), overlapped, resumable.

    prompts ──► play (Ray Data tasks ⇄ sampler pool) ──► blocks on disk ──► coordinator ──► learner workers
                     ▲                                                                          │
                     └──── pool.load ◄── published weights (object store) ◄── end of iteration ─┘

| who is faster | what happens |
|---|---|
| opponent | runs on to the end of the iteration, then evaluates and idles; its blocks wait in the object store, which spills |
| main player | waits for the next block in order (`waited_s`); from iteration 1 on the replay blocks keep it busy first |
| storage | a block counts only when it is on disk, so a slow disk slows both players and loses nothing |
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from spin_ray.background import in_background
from spin_ray.chatter import captured_output
from spin_ray.config import Config
from spin_ray.data import counted, load_prompts
from spin_ray.errors import BadInput, WeightsLost
from spin_ray.evaluation import evaluate
from spin_ray.exchange.audit import Audit, AuditError, check_first_loss, compare, pair_mismatch
from spin_ray.exchange.pairs import PlayPlan, play, read_prompts, write_prompts, write_table
from spin_ray.guard import FirstAnswers, Rollbacks, check_nll
from spin_ray.interrupt import Interrupts
from spin_ray.learner.coordinator import Base
from spin_ray.learner.group import Learner, follow
from spin_ray.learner.messages import Divergence, Publish, Save, Saving, Score, StepRecord, Train, TrainReport
from spin_ray.losses import LOSS_AT_ZERO, spin_loss
from spin_ray.manifest import RunDir
from spin_ray.model import ModelFacts, inspect_model, longest_sequence
from spin_ray.overlap import BlockSpec, Overlap
from spin_ray.placement import Hardware
from spin_ray.records import PROMPT_SCHEMA, Prompt, PublishedWeights, Span, Version, real_only, to_table
from spin_ray.sampler.pool import AUDIT, sampling_settings, start_opponent
from spin_ray.system import let_learner_go_first, ray_cluster
from spin_ray.terminal import Terminal
from spin_ray.timeline import Timeline
from spin_ray.tracking import Tracker

NOTABLE_MISMATCH = 0.1
"""A margin that the engines' difference alone may move this far gets a warning; a margin of 0.1 moves the loss by 0.05."""


def run_spin(config: Config) -> None:
    """Play all iterations of a run, going on where an earlier one stopped; returns when the run is finished."""
    run = RunDir.open(config, "run")
    with run.locked(), captured_output(run.logs / "driver.log") as to_user:
        _run(config, run, Terminal(to_user))


def _run(config: Config, run: RunDir, terminal: Terminal) -> None:
    last_model = run.storage.name(run.model(config.spin.num_iterations - 1))
    if run.marks("finished"):
        terminal.say(f"{run} is finished; the model is {last_model}")
        return
    interrupts = Interrupts()
    interrupts.listen()
    facts = inspect_model(config)
    prepared = prepare(config, run, facts, terminal)
    max_model_len = longest_sequence(prepared.train + prepared.heldout, config.sampler.max_new_tokens, facts)
    with ExitStack() as stack:
        hardware = stack.enter_context(ray_cluster(config))
        interrupts.listen()
        blocks = len(prepared.block_sizes)
        terminal.say(f"{run}: {len(prepared.train)} prompts in {blocks} blocks, {hardware.device}, {hardware.dtype}; starting")
        players = stack.enter_context(start_players(config, run, facts, hardware, max_model_len))
        with Tracker(config, run.path) as tracker, terminal:
            SelfPlay(config, run, facts, prepared, hardware, players, tracker, terminal, interrupts).play()
    terminal.say(f"finished: the model is {last_model}")


@dataclass(frozen=True)
class Prepared:
    """The data as token ids."""

    train: list[Prompt]
    heldout: list[Prompt]
    block_sizes: list[int]


def prepare(config: Config, run: RunDir, facts: ModelFacts, terminal: Terminal) -> Prepared:
    """Tokenise once; a resumed run reads what the first one wrote."""
    marks = run.marks("prepared")
    if marks:
        sizes = marks[0]["block_sizes"]
        run.storage.fetch(run.prepared())
        train = [prompt for index in range(len(sizes)) for prompt in read_prompts(run.prompts(index))]
        return Prepared(train, read_prompts(run.heldout()), sizes)
    data = config.data
    train, counts = load_prompts(data.train, data, facts.chat, seed=config.run.seed, limit=data.max_prompts)
    heldout, heldout_counts = [], {}
    if data.eval:
        heldout, heldout_counts = load_prompts(data.eval, data, facts.chat, seed=config.run.seed, limit=data.max_eval_prompts)
    terminal.say(counted(data.train, counts))
    if data.eval:
        terminal.say(counted(data.eval, heldout_counts))
    sizes = write_prompts(run, train, config.sampler.block_prompts)
    write_table(run.heldout(), to_table(heldout, PROMPT_SCHEMA))
    run.storage.publish(run.prepared())
    run.mark("prepared", block_sizes=sizes, train=counts, heldout=heldout_counts)
    return Prepared(train, heldout, sizes)


@dataclass(frozen=True)
class Players:
    pool: Any
    """Actor handle of the SamplerPool."""
    learner: Learner


@contextmanager
def start_players(config: Config, run: RunDir, facts: ModelFacts, hardware: Hardware, max_model_len: int) -> Iterator[Players]:
    """Start opponent and main player side by side from the newest finished version."""
    version = len(run.marks("iteration"))
    if version:
        run.check_model(version - 1)
    run.drop_outdated(config.run)
    model_path = str(run.model(version - 1)) if version else facts.path
    # In float32 the exported model is exact; a bfloat16 one lacks its float32 masters.
    checkpoint = run.checkpoint(version - 1) if version and hardware.dtype == "bfloat16" else None
    if checkpoint and not run.storage.exists(checkpoint):
        where = run.storage.name(checkpoint)
        raise BadInput(f"{where}: the checkpoint of the last finished iteration is gone; put it back, or start a new run")
    pool = start_opponent(config, model_path, version, hardware, max_model_len=max_model_len, logs=run.logs, storage=run.storage)
    learner = Learner(
        config, hardware, model_path=model_path, logs=run.logs, checkpoint=checkpoint, rollbacks=len(run.marks("rollback")),
        storage=run.storage,
    )
    yield Players(pool, learner)
    learner.stop()


class SelfPlay:
    """Algorithm 1. Version t is theta_t: the opponent of iteration t, and what iteration t - 1 made of the main player.

    Beside the main thread, which drives the learner, one thread hands on what the opponent plays, iteration after iteration;
    evaluations and, in `lookahead`, snapshots have short-lived threads of their own. An error in any of them ends all waits.
    """

    def __init__(
        self, config: Config, run: RunDir, facts: ModelFacts, prepared: Prepared, hardware: Hardware, players: Players,
        tracker: Tracker, terminal: Terminal, interrupts: Interrupts,
    ):
        self._config, self._run, self._facts, self._prepared, self._hardware = config, run, facts, prepared, hardware
        self._pool, self._learner = players.pool, players.learner
        self._tracker, self._terminal, self._interrupts = tracker, terminal, interrupts
        self._first, self._last = len(run.marks("iteration")), config.spin.num_iterations
        self._overlap = Overlap(config, prepared.block_sizes, self._first)
        self._timeline = Timeline(run.path)
        self._rollbacks, self._first_answers = Rollbacks(config, run, self._learner, tracker, terminal), FirstAnswers(config, facts.chat)
        self._snapshots_used: set[int] = set()
        """Iterations whose training has a snapshot that played ahead."""
        self._settings = sampling_settings(config, facts.chat)
        self._tokens_per_pair = 2 * float(np.mean([len(prompt.real_ids) for prompt in prepared.train]))
        self._mismatch: dict[int, float] = {}
        """Iteration -> beta times the nats by which the engines' difference may move a pair's log-ratio."""
        self._plays: dict[int, _Play] = {}
        self._evaluations: dict[int, Future] = {}
        self._coming = 0
        """Number of the newest version that is to be loaded."""
        self._tied_names: Mapping[str, str] = (run.marks("iteration") or [{}])[-1].get("tied_names", {})
        self._last_metrics: dict[int, dict[str, float]] = {}
        """Iteration -> metrics of its newest step."""

    def play(self) -> None:
        """All iterations that the manifest does not call finished."""
        try:
            probe = self._learner.post(self._probe())
            training = self._post_training(self._first)
            beside = [self._beside(self._play_opponent)]  # its pipeline starts up while the engines do
            self._wait_for_sampler()
            self._audit(Version(self._first), self._learner.result(probe))
            if self._first and self._prepared.heldout:  # put off when the session before ended, or seen by a guard that ended it
                beside.append(self._start_evaluation(self._first - 1, {}))
            beside += self._release(self._first, {})
            for t in range(self._first, self._last):
                report = follow(self._learner, training, self._note, self._interrupts)
                with self._interrupts.graceful():  # a signal here ends the next iteration's training before it begins
                    training = self._become_opponent(t + 1, report)
                beside += self._release(t + 1, self._trained(t, report))
                beside.append(self._beside(self._run.mark_checksums, t))
            for thread in beside:
                thread.result()
        finally:
            self._draw_timeline()
        self._run.mark("finished")

    def _wait_for_sampler(self) -> None:
        ready = self._pool.ready.remote()
        while not ray.wait([ready], timeout=60)[0]:
            number = self._config.sampler.num_replicas
            self._terminal.say(f"still waiting for the first of {number} samplers; free: {ray.available_resources()}")
        ray.get(ready)

    def _play_opponent(self) -> None:
        """Lines 3-5: theta_t answers every prompt. Hands every block on as soon as it is finished."""
        plan = PlayPlan(
            self._run, self._pool, self._settings, score=self._config.reference.scorer == "opponent",
            max_steps_early=self._overlap.max_steps_early,
        )
        blocks = [block for t in range(self._first, self._last) for block in self._overlap.blocks(t)]
        for block, table in play(plan, blocks, self._hardware.blocks_in_flight):
            count = self._count(block.iteration)
            ray.get(self._learner.coordinator.put_block.remote(block.iteration, block.place, [ray.put(table)]))
            self._overlap.block_played(block)
            self._note_played(block, table, count)

    def _note_played(self, block: BlockSpec, table: pa.Table, count: _Play) -> None:
        t, name = block.iteration, self._run.storage.name(self._run.pairs(block.iteration, block.kind, block.index))
        if block.kind == "block" and (shares := self._first_answers.look(t, table, name)):
            self._tracker.log("sampler", shares, iteration=t, opponent_version=t)
        count.pairs += len(table)
        count.drawn += 0 if block.kind == "replay" else pc.sum(pc.list_value_length(table.column("generated_ids"))).as_py()
        seconds = time.monotonic() - count.begun
        rate = count.drawn / seconds
        doing = f"{rate:,.0f} tok/s" if count.drawn else "re-scoring"
        text = f"iteration {t}  pairs {count.pairs}/{count.total}  {doing}"
        self._terminal.progress("opponent", count.pairs, count.total, text)
        if count.pairs == count.total:
            self._tracker.log("sampler", {"play_s": seconds, "tokens_per_s": rate}, iteration=t, opponent_version=t)
            self._log_examples(t, table)

    def _post_training(self, t: int) -> int | None:
        """Line 6: theta_{t+1} = argmin over the pairs of iteration t (and t - 1). Posted early: the workers wait for the blocks."""
        if t == self._last:
            return None
        config, spin, overlap = self._config, self._config.spin, self._overlap
        return self._learner.post(Train(
            iteration=t, block_sizes=tuple(block.size for block in overlap.blocks(t)), num_epochs=spin.num_epochs,
            num_steps=overlap.num_steps(t),
            loss_fn=functools.partial(spin_loss, beta=config.beta(t), loss=spin.loss, nll_weight=spin.nll_weight),
            normalizer=len, lr=config.lr(t), scorer=config.reference.scorer,
            wait_for_all=overlap.waits_for_all, snapshot=overlap.snapshot(t), progress_path=str(self._run.progress(t)),
        ))

    def _note(self, record: StepRecord | Span | Saving | Divergence) -> None:
        """What the learner's workers have to say while they train."""
        match record:
            case Span():
                self._timeline.add([record])
            case Divergence():
                self._rollbacks.answer(record, played_ahead=self._has_played_ahead(record.iteration, record.step))
            case StepRecord():
                self._note_step(record)

    def _note_step(self, record: StepRecord) -> None:
        t, step, metrics = record.iteration, record.step, record.metrics
        if step == 0:
            self._check_first_loss(t, metrics["spin_loss"])
        if step % self._config.tracking.log_every_steps == 0 or step == record.total_steps - 1:
            logged = {**metrics, "global_step": self._overlap.steps_before(t) + step}
            self._tracker.log("train", logged, iteration=t, step=step, opponent_version=t)
        text = f"iteration {t}  step {step + 1}/{record.total_steps}  loss {metrics['loss']:.3f}  margin {metrics['margin']:.2f}  " \
               f"{metrics['pairs_per_s']:.0f} pairs/s  waited {metrics['waited_s']:.1f} s"
        self._last_metrics[t] = metrics
        self._terminal.progress("main player", step + 1, record.total_steps, text)

    def _check_first_loss(self, t: int, loss: float) -> None:
        if self._overlap.starts_stale(t) and self._config.reference.scorer == "opponent":
            return  # its first pairs were played against a snapshot, not against theta_t
        at_zero = LOSS_AT_ZERO[self._config.spin.loss]
        deviation = check_first_loss(t, loss, at_zero=at_zero, mismatch=self._mismatch[t])
        self._tracker.log("audit", {"first_loss_deviation": deviation}, opponent_version=t)

    def _become_opponent(self, version: int, report: TrainReport) -> int | None:
        """theta_{t+1} becomes the opponent: durable on disk, loaded by the samplers, audited, marked. Returns the next training.

        If a worker dies on the way, the new group trains iteration t again from what is left, and everything is done again
        with its weights: what is on disk, what the samplers hold and what is marked is always one and the same theta_{t+1}.
        """
        run, t, learner = self._run, version - 1, self._learner
        posted: list[int] = []
        moved = False
        while not moved:
            if not posted:
                commands = Publish(Version(version)), self._probe(), Save(str(run.model(t)), str(run.checkpoint(t)))
                posted = [learner.post(command) for command in commands]
                training = self._post_training(version)
            publish, probe, save = posted
            group = None
            while group != (group := learner.group()):  # again until one and the same group has answered it all
                try:
                    weights = self._result(publish)
                    self._load(weights)
                    audit = self._audit(Version(version), self._result(probe))  # while the main player writes its files
                    self._result(save)
                except WeightsLost:
                    learner.wait_for_group_after(group)
                except AuditError:
                    if group == learner.group():  # else the samplers hold the weights of a group that has died
                        raise
            run.storage.commit(run.model(t))
            run.storage.commit(run.checkpoint(t))
            masters = str(run.checkpoint(t)) if self._hardware.dtype == "bfloat16" else None
            moved = learner.move_base(Base(str(run.model(t)), masters, first_command=save + 1, iteration=version), group)
        ray.get(self._pool.saved.remote(Version(version), str(run.model(t))))
        self._tied_names = weights.tied_names
        run.mark("iteration", iteration=t, report=asdict(report), audit=asdict(audit), tied_names=dict(weights.tied_names))
        run.drop_outdated(self._config.run)
        return training

    def _result(self, key: int | Version) -> Any:
        """What the learner has to answer at an iteration's border, where a new group of workers may train once more first."""
        return follow(self._learner, key, self._note, self._interrupts, patience_s=math.inf)

    def _load(self, weights: PublishedWeights) -> None:
        """Bring new weights to the samplers, once they owe nothing under the old ones. Raises WeightsLost."""
        self._overlap.wait_until_may_load(weights.version)
        self._coming = weights.version.number
        for version, evaluation in list(self._evaluations.items()):
            if version < weights.version.number - 1:
                evaluation.result()  # an evaluation is put off once, not for ever
        begun = time.monotonic()
        seconds = max(ray.get(self._pool.load.remote(weights)), default=0.0)
        metrics = {"load_s": seconds, "total_s": time.monotonic() - begun, "gib_per_s": weights.num_bytes / 2**30 / max(seconds, 1e-9)}
        self._tracker.log("sync", metrics, opponent_version=weights.version.number)

    def _play_ahead(self, version: Version) -> None:
        """`lookahead`: a snapshot of the main player opens the next iteration while this one is still trained on."""
        group = self._learner.group()
        try:
            weights = self._learner.result(version)
            self._snapshots_used.add(version.number - 1)
            self._load(weights)
        except WeightsLost:
            self._learner.wait_for_group_after(group)
            return self._play_ahead(version)
        self._open(version)

    def _has_played_ahead(self, t: int, step: int) -> bool:
        """Whether samplers hold, or held, a snapshot of iteration t's training, which has got to `step`."""
        early = self._overlap.snapshot(t)
        return t in self._snapshots_used or (early is not None and step >= early[0])

    def _probe(self) -> Score:
        prompts = self._prepared.train[: self._config.audit.num_prompts]
        return Score(tuple(real_only(prompt, self._first) for prompt in prompts))

    def _audit(self, version: Version, probed: list[np.ndarray]) -> Audit:
        """Sampler and learner score the same real answers; `probed` is what the learner answered to `_probe`."""
        prompts, t = self._prepared.train[: self._config.audit.num_prompts], version.number
        sampler = ray.get(self._pool.score.remote(version, [p.prompt_ids for p in prompts], [p.real_ids for p in prompts], AUDIT))
        audit = compare(t, sampler, probed[::2], self._hardware.audit_tolerance)
        self._tracker.log("audit", {"mean_abs_logp_difference_nats": audit.mean_nats, "max_abs_logp_difference_nats": audit.max_nats},
                          opponent_version=t)
        if t < self._last:
            beta = self._config.beta(t)
            self._mismatch[t] = beta * pair_mismatch(audit, self._tokens_per_pair)
            if self._mismatch[t] > NOTABLE_MISMATCH and self._config.reference.scorer == "opponent":
                self._terminal.say(
                    f"warning: iteration {t}: spin.beta={beta:g} times the engines' difference of {self._mismatch[t] / beta:.3g} nats "
                    f"per pair moves margins by {self._mismatch[t]:.2g}; reference.scorer=frozen or learner has no such difference"
                )
        return audit

    def _release(self, version: int, trained: dict[str, Any]) -> list[Future]:
        """theta_version may play, and be evaluated in what time the play leaves; returns what goes on beside the main thread."""
        self._open(Version(version))
        if self._hardware.learner_first:
            let_learner_go_first()  # every time: processes come and go
        beside = [self._start_evaluation(version, trained)]
        early = self._overlap.snapshot(version)
        played = [self._run.has_pairs(b.iteration, b.kind, b.index) for b in self._overlap.blocks_ahead(version + 1)] if early else []
        if any(played):
            self._snapshots_used.add(version)
        if early and not all(played):
            beside.append(self._beside(self._play_ahead, early[1]))
        return beside

    def _start_evaluation(self, version: int, trained: dict[str, Any]) -> Future:
        self._evaluations[version] = self._beside(self._evaluate, version, trained)
        return self._evaluations[version]

    def _open(self, version: Version) -> None:
        if version.number < self._last:
            self._count(version.number)
        ray.get(self._pool.release.remote(version))

    def _count(self, t: int) -> _Play:
        return self._plays.setdefault(t, _Play(sum(block.size for block in self._overlap.blocks(t))))

    def _beside(self, function: Callable[..., None], *args: Any) -> Future:
        """Run beside the main thread; an error ends every wait, the learner's and the driver's."""

        def guarded() -> None:
            try:
                function(*args)
            except BaseException as error:
                self._overlap.fail(error)
                self._learner.fail(error)
                raise

        return in_background(guarded)

    def _trained(self, t: int, report: TrainReport) -> dict[str, Any]:
        """Log iteration t as a whole; returns what the table says of its training."""
        for record in self._learner.drain():
            self._note(record)
        self._timeline.add(ray.get(self._pool.spans.remote()))
        idle = self._timeline.idle_share(t)
        self._tracker.log("sampler", {"num_restarts": ray.get(self._pool.num_restarts.remote())}, iteration=t, opponent_version=t)
        rates = {"pairs_per_s": report.num_pairs / report.wall_s, "tokens_per_s": report.num_tokens / report.wall_s}
        self._tracker.log("iteration", {**asdict(report), **rates, "learner_idle_share": idle}, iteration=t, opponent_version=t + 1)
        last = self._last_metrics[t]
        return {"loss": last["loss"], "margin": last["margin"], "train_s": report.wall_s, "waited_s": report.waited_s}

    def _evaluate(self, version: int, trained: dict[str, Any]) -> None:
        """Held-out metrics of theta_version; rides on the samplers, behind what they have to play.

        What is not begun when the next weights are there is put off until they have played. It is put off once: if the samplers are the
        slower player, the main player waits for it then.
        """
        metrics = self._metrics().get(version, {})
        if self._prepared.heldout and not metrics:
            self._overlap.wait_until_may_evaluate(version)
            self._catch_up(version)
            metrics = evaluate(self._pool, Version(version), self._prepared.heldout, self._facts.chat, self._settings)
            self._tracker.log("eval", metrics, opponent_version=version)
            self._run.mark("evaluation", version=version, metrics=metrics)
        self._terminal.row({"model": f"theta_{version}" if version else "SFT", **metrics, **trained})
        if metrics and version:
            before = self._metrics()[0]
            name = "real_nll_nats_per_token"
            model = self._run.storage.name(self._run.model(version - 1))
            check_nll(version, metrics[name], before[name], self._config, model)

    def _metrics(self) -> dict[int, dict[str, float]]:
        return {mark["version"]: mark["metrics"] for mark in self._run.marks("evaluation")}

    def _catch_up(self, version: int) -> None:
        """First the evaluation of the version before, if it was put off: its weights come back for as long as it takes."""
        before = self._evaluations.get(version - 1)
        if before and not before.done():
            ray.get(self._pool.load_again.remote(self._on_disk(version - 1), Version(version)))
            before.result()
            if self._coming <= version:
                ray.get(self._pool.load_again.remote(self._on_disk(version), Version(version)))

    def _on_disk(self, version: int) -> PublishedWeights:
        folder = str(self._run.model(version - 1)) if version else self._facts.path
        return PublishedWeights(Version(version), (), 0, self._tied_names, folder)

    def _draw_timeline(self) -> None:
        """timeline.png: what both players did when, of all sessions of this run; also where the run failed."""
        with suppress(ray.exceptions.RayError):  # a pool that has died must not hide why the run ends
            self._timeline.add(ray.get(self._pool.spans.remote()))
        if picture := self._timeline.draw():
            self._tracker.image("timeline", picture)

    def _log_examples(self, t: int, table: pa.Table) -> None:
        texts = ("prompt_ids", "real_ids", "generated_ids")
        rows = [[t, *(self._facts.chat.decode(row[name]) for name in texts)] for row in table.slice(0, 8).to_pylist()]
        self._tracker.table("pairs", ["iteration", "prompt", "real", "generated"], rows)


@dataclass
class _Play:
    """How far the opponent has got with an iteration."""

    total: int
    pairs: int = 0
    drawn: int = 0
    """Tokens sampled."""
    begun: float = field(default_factory=time.monotonic)
