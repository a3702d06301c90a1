"""Self-play fine-tuning: the loop of Algorithm 1 (arXiv 2401.01335), overlapped, resumable.

            opponent (opponent.py)                                              main player (learner/)
    prompts ──► play (Ray Data tasks ⇄ sampler pool) ──► blocks on disk ──► coordinator ──► workers: train
                     ▲                                                                          │
                     └──── load, audit, release ◄── published weights (object store) ◄── end of iteration

| who is faster | what happens |
|---|---|
| opponent | runs on to the end of the iteration, then evaluates and idles; its blocks wait in the object store, which spills |
| main player | waits for the next block in order (`waited_s`); from iteration 1 on the replay blocks keep it busy first |
| storage | a block counts only when it is on disk, so a slow disk slows both players and loses nothing |

What the main player reports is acted on in the order of learner/reports.py, whoever is late.
"""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from spin_ray.background import Threads, in_background
from spin_ray.chatter import captured_output
from spin_ray.config import Config
from spin_ray.errors import WeightsLost
from spin_ray.exchange.audit import Audit, AuditError
from spin_ray.guard import FirstLosses, Rollbacks
from spin_ray.interrupt import Interrupted, Interrupts
from spin_ray.learner.coordinator import Base
from spin_ray.learner.group import follow
from spin_ray.learner.messages import Divergence, Proved, Publish, Save, Saving, StepRecord, Train, TrainReport
from spin_ray.learner.reports import Reports
from spin_ray.losses import spin_loss
from spin_ray.manifest import RunDir
from spin_ray.model import ModelFacts, inspect_model, longest_sequence
from spin_ray.opponent import Opponent
from spin_ray.overlap import Overlap
from spin_ray.placement import Hardware
from spin_ray.players import Players, start_players
from spin_ray.preflight import Proof, proof_pairs, refuse_sampler
from spin_ray.prepared import Prepared, prepare
from spin_ray.records import Span, Version
from spin_ray.reporting import Reporting
from spin_ray.system import ray_cluster
from spin_ray.terminal import Terminal
from spin_ray.tracking import Tracker


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
    facts, proof = inspect_model(config), Proof()
    proof.end(config, facts, terminal.say)
    prepared = prepare(config, run, facts, proof, terminal)
    max_model_len = longest_sequence(prepared.train + prepared.heldout, config.sampler.max_new_tokens, facts)
    with ExitStack() as stack:
        hardware = stack.enter_context(ray_cluster(config))
        interrupts.listen()
        refuse_sampler(facts, hardware)
        blocks = len(prepared.block_sizes)
        terminal.say(f"{run}: {len(prepared.train)} prompts in {blocks} blocks, {hardware.device}, {hardware.dtype}; starting")
        players = stack.enter_context(start_players(config, run, facts, hardware, max_model_len, proof_pairs(prepared.train)))
        with Tracker(config, run.path) as tracker, terminal:
            SelfPlay(config, run, facts, prepared, hardware, players, proof, tracker, terminal, interrupts).play()
    terminal.say(f"finished: the model is {last_model}")


class SelfPlay:
    """Algorithm 1. Version t is theta_t: the opponent of iteration t, and what iteration t - 1 made of the main player.

    The main thread drives the learner; the opponent has threads of its own. An error in any of them ends all waits.
    """

    def __init__(
        self, config: Config, run: RunDir, facts: ModelFacts, prepared: Prepared, hardware: Hardware, players: Players,
        proof: Proof, tracker: Tracker, terminal: Terminal, interrupts: Interrupts,
    ):
        self._config, self._run, self._hardware, self._interrupts = config, run, hardware, interrupts
        self._learner, self._first, self._last = players.learner, len(run.marks("iteration")), config.spin.num_iterations
        self._overlap = Overlap(config, prepared.block_sizes, self._first)
        self._threads = Threads(self._overlap.fail, self._learner.fail)
        self._reports, self._reporting = Reports(self._act_on), Reporting(config, run, facts.chat, self._overlap, proof, tracker, terminal)
        self._opponent = Opponent(
            config, run, facts, hardware, players.pool, self._learner, self._overlap, self._threads, self._reporting,
            prompts=prepared.train, heldout=prepared.heldout,
        )
        tokens_per_pair = 2 * float(np.mean([len(prompt.real_ids) for prompt in prepared.train]))
        self._first_losses = FirstLosses(config, self._overlap, tokens_per_pair, tracker, terminal)
        self._rollbacks = Rollbacks(config, run, self._learner, tracker, terminal)
        self._all_trained = self._first == self._last

    def play(self) -> None:
        """All iterations that the manifest does not call finished."""
        try:
            self._learner.when_failed(self._end_with_the_learner)
            self._iterations()
            self._threads.finish()
        except Exception as error:
            raise self._threads.original(error) from None
        finally:
            with suppress(ray.exceptions.RayError):  # a pool that has died must not hide why the run ends
                self._reporting.spans(self._opponent.spans())
            self._reporting.draw_timeline()
        self._run.mark("finished")

    def _iterations(self) -> None:
        opponent, probe = self._opponent, self._learner.post(self._opponent.probe())
        training = self._post_training(self._first)
        opponent.start()
        probed = in_background(self._learner.result, probe)
        self._audit(self._first, self._reporting.wait_for(probed, self._threads, "the main player", f"{self._run.logs}/learner-0.log"))
        self._reports.stands(self._first, group=0)
        opponent.evaluate_the_one_before(self._first)
        opponent.release(self._first, {})  # lines 3-5: theta_t answers every prompt
        for t in range(self._first, self._last):
            follow(self._learner, training, self._reports.arrived, self._interrupts)  # line 6
            with self._interrupts.graceful():  # a signal here ends the next iteration's training before it begins
                made = self._become_opponent(t + 1, training)
            self._all_trained = made.next_training is None
            trained = self._trained(t, made.report)
            self._reports.stands(t + 1, group=made.group)
            opponent.release(t + 1, trained)
            self._threads.start(self._run.mark_checksums, t)
            training = made.next_training

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

    def _become_opponent(self, version: int, training: int) -> Made:
        """theta_{t+1} becomes the opponent: durable on disk, loaded by the samplers, audited, marked.

        If a worker dies on the way, the new group trains iteration t again from what is left, and everything is done again with its
        weights: the report, what is on disk, what the samplers hold and what is marked are always of one and the same theta_{t+1}.
        """
        run, t, learner, opponent = self._run, version - 1, self._learner, self._opponent
        commands = Publish(Version(version)), opponent.probe(), Save(str(run.model(t)), str(run.checkpoint(t)))
        publish, probe, save = [learner.post(command) for command in commands]
        next_training = self._post_training(version)
        moved = False
        while not moved:
            group = None
            while group != (group := learner.group()):  # again until one and the same group has answered it all
                try:
                    report, weights = self._result(training), self._result(publish)
                    opponent.load(weights)
                    audit = self._audit(version, self._result(probe))  # while the main player writes its files
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
        opponent.saved(weights, str(run.model(t)))
        run.mark("iteration", iteration=t, report=asdict(report), audit=asdict(audit), tied_names=dict(weights.tied_names))
        run.drop_outdated(self._config.run)
        return Made(report, group, next_training)

    def _result(self, key: int) -> Any:
        """What the learner has to answer at an iteration's border, where a new group of workers may train once more first."""
        return follow(self._learner, key, self._reports.arrived, self._interrupts, patience_s=math.inf)

    def _audit(self, version: int, probed: list[np.ndarray]) -> Audit:
        audit = self._opponent.audit(Version(version), probed)
        if version < self._last:
            self._first_losses.audited(version, audit)
        return audit

    def _act_on(self, report: StepRecord | Span | Saving | Divergence | Proved) -> None:
        """What the learner's workers report, when it is its turn."""
        match report:
            case Proved():
                self._reporting.proved(report)
            case Span():
                self._reporting.spans([report])
            case StepRecord():
                if report.step == 0:
                    self._first_losses.judge(report.iteration, report.metrics["spin_loss"])
                self._reporting.step(report)
            case Divergence():
                with self._opponent.voiding_snapshot(report.iteration, report.step) as played_ahead:
                    self._rollbacks.answer(report, played_ahead=played_ahead)

    def _trained(self, t: int, report: TrainReport) -> dict[str, Any]:
        """Iteration t is over; returns what the table says of its training."""
        for record in self._learner.drain():
            self._reports.arrived(record)
        self._first_losses.judge_at_the_end(t, report.first_loss)
        self._reporting.spans(self._opponent.spans())
        return self._reporting.trained(t, report, num_restarts=self._opponent.num_restarts())

    def _end_with_the_learner(self, error: BaseException) -> None:
        """The learner's failure ends the opponent's waits too, as long as there is something to train."""
        if not (self._all_trained or isinstance(error, Interrupted)):  # one who is interrupted has time to mark what is trained
            self._threads.fail(error)


@dataclass(frozen=True)
class Made:
    """A theta_{t+1} that is the opponent."""

    report: TrainReport
    group: int
    """Number of the group of workers that made it."""
    next_training: int | None
    """The command that trains against it; None: that was the last iteration."""
