"""Self-play fine-tuning: the loop of Algorithm 1 (arXiv 2401.01335), overlapped, resumable. Other methods leave out what they lack.

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

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from spin_ray import provenance
from spin_ray.background import Threads
from spin_ray.chatter import captured_output
from spin_ray.config import Config
from spin_ray.errors import Diverged, Enough, WeightsLost
from spin_ray.evaluation import tasks_of
from spin_ray.exchange.audit import Audit, AuditError
from spin_ray.exits import why_it_ends
from spin_ray.guard import FirstLosses, Rollbacks
from spin_ray.interrupt import Interrupted, Interrupts
from spin_ray.learner.coordinator import Base
from spin_ray.learner.group import follow
from spin_ray.learner.messages import Divergence, Grouped, Proved, Saving, StepRecord, Train, TrainReport, first_losses
from spin_ray.learner.reports import Reports
from spin_ray.manifest import RunDir
from spin_ray.methods import method_of
from spin_ray.model import ModelFacts, inspect_model, longest_sequence
from spin_ray.opponent import Bystander, Opponent
from spin_ray.overlap import Overlap
from spin_ray.pages import Pages
from spin_ray.placement import Hardware
from spin_ray.players import Players, as_placed, start_players
from spin_ray.preflight import Proof, proof_pairs, refuse_sampler
from spin_ray.prepared import Prepared, prepare
from spin_ray.provenance import Origin
from spin_ray.records import Saved, Span
from spin_ray.reporting import Reporting
from spin_ray.system import ray_cluster
from spin_ray.terminal import Terminal
from spin_ray.theta import Thetas, make_base, thetas_of
from spin_ray.tracking import Tracker
from spin_ray.turns import MAIN_PLAYER, OPPONENT, Turns

if TYPE_CHECKING:
    from spin_ray.tasks.harness import Tasks


def run_method(config: Config, origin: Origin | None = None, *, quiet: bool = False) -> None:
    """All iterations of a run, going on where an earlier one stopped; returns when the run is finished. `origin`: what it is to repeat."""
    run = RunDir.open(config)
    with run.locked(), captured_output(run.logs / "driver.log") as to_user, Terminal(to_user, run.said, quiet=quiet) as terminal:
        try:
            _run(config, run, terminal, origin)
        except BaseException as error:
            if why := why_it_ends(error):
                terminal.keep(f"spin-ray: {why}")  # it is said when all is shut down
            raise


def _run(config: Config, run: RunDir, terminal: Terminal, origin: Origin | None) -> None:
    method = method_of(config)
    if run.finished:
        terminal.conclude(f"{run} is {_outcome(run)}")
        return
    interrupts = Interrupts()
    interrupts.listen()
    terminal.status(f"reading {config.model.path}'s tokenizer and config")
    facts, proof = inspect_model(config), Proof()
    proof.end(config, facts, terminal.say)
    tasks = tasks_of(config, facts, terminal.say)
    prepared = prepare(config, run, facts, proof, terminal)
    if origin:
        _check_origin(origin, run, facts, terminal)
    if config.spin.stop != "never" and method.plays and not prepared.heldout:
        terminal.say(f"spin.stop={config.spin.stop} has nothing to go by without data.eval: all iterations will be played")
    thetas, samplers = thetas_of(config, run, facts), method.plays or bool(prepared.heldout or tasks)
    max_model_len = longest_sequence(prepared.lengths.and_of(prepared.heldout), config.sampler.max_new_tokens if samplers else 0, facts)
    max_model_len = max(max_model_len, tasks.max_model_len if tasks else 0)
    with ExitStack() as stack:
        stack.callback(_tell_of_the_end, run, terminal)
        terminal.status("starting Ray, or joining it")
        hardware = stack.enter_context(ray_cluster(config, samplers=samplers, say=terminal.say))
        interrupts.listen()
        config = as_placed(config, hardware, terminal.say)
        if samplers:
            refuse_sampler(facts, hardware)
        blocks = len(prepared.block_sizes)
        run.mark("session", **provenance.session(config, facts, hardware))
        make_base(config, run, facts, hardware.dtype)
        terminal.say(f"{run}: {prepared.lengths.num_prompts} prompts in {blocks} blocks, {hardware.device}, {hardware.dtype}; starting")
        players = stack.enter_context(
            start_players(config, thetas, hardware, max_model_len, proof_pairs(prepared.first), samplers=samplers)
        )
        terminal.status("loading the model: opponent and main player start")
        with Tracker(config, run.path, terminal.say) as tracker:
            SelfPlay(config, thetas, facts, prepared, hardware, players, proof, tracker, terminal, interrupts, tasks).play()


def _check_origin(origin: Origin, run: RunDir, facts: ModelFacts, terminal: Terminal) -> None:
    """Raises BadInput if the run could not be the same as the one that it is to repeat."""
    origin.check({
        "weights": provenance.weights_digest(facts), "prompts": run.marks("prepared")[-1].get("sha256", ""),
        "template": provenance.template_digest(facts),
    })
    terminal.say(origin.other_software() or f"repeats {origin.path}: the same model, prompts, template and software")


def _tell_of_the_end(run: RunDir, terminal: Terminal) -> None:
    if run.finished:
        terminal.conclude(_outcome(run))


def _last_model(run: RunDir) -> str:
    mark = run.marks("iteration")[-1]
    return mark.get("model") or run.storage.name(run.model(mark["iteration"]))  # runs of earlier versions did not say


def _outcome(run: RunDir) -> str:
    """How a finished run has ended, for the user."""
    last, best = _last_model(run), run.best()
    ends = run.marks("stopped", "extended")
    why = f" early, {ends[-1]['reason']}" if ends and ends[-1]["stage"] == "stopped" else ""
    return f"finished{why}: the model is {last}" + (f"; the best by its held-out numbers is {best}" if best not in (None, last) else "")


class SelfPlay:
    """Algorithm 1. Version t is theta_t: the opponent of iteration t, and what iteration t - 1 made of the main player.

    The main thread drives the learner; the opponent has threads of its own. An error in any of them ends all waits.
    """

    def __init__(
        self, config: Config, thetas: Thetas, facts: ModelFacts, prepared: Prepared, hardware: Hardware, players: Players,
        proof: Proof, tracker: Tracker, terminal: Terminal, interrupts: Interrupts, tasks: Tasks | None = None,
    ):
        self._config, self._thetas, self._run, self._hardware, self._interrupts = config, thetas, (run := thetas.run), hardware, interrupts
        self._facts = facts
        self._method = method = method_of(config)
        self._learner, self._first, self._last = players.learner, len(run.marks("iteration")), method.num_iterations
        self._turns: Turns | None = None
        self._overlap = overlap = Overlap(config, method, prepared.block_sizes, self._first)
        self._threads = threads = Threads(overlap.fail, self._learner.fail)
        self._reporting = reporting = Reporting(
            config, method, run, facts.chat, overlap, proof, tracker, terminal, Pages(config, thetas, facts.chat, terminal.say)
        )
        self._reports = Reports(self._act_on)
        if players.pool is None:
            self._opponent = Bystander(method, run, self._learner, overlap, threads, reporting)
        else:
            self._opponent = Opponent(
                config, method, thetas, facts, hardware, players.pool, players.fleet, self._learner, overlap, threads, reporting,
                first=prepared.first, heldout=prepared.heldout, tasks=tasks,
            )
            self._turns = players.turns(self._opponent, self._result)
        self._first_losses = FirstLosses(method, overlap, prepared.lengths.tokens_per_answer, tracker, terminal)
        self._rollbacks = Rollbacks(config, run, self._learner, tracker, terminal)
        self._all_trained = self._first == self._last
        self._committed: tuple[int, int] | None = None
        """(iteration, group) of what was last put in its place."""

    def play(self) -> None:
        """All iterations that the manifest does not call finished."""
        try:
            self._learner.when_failed(self._end_with_the_learner)
            self._iterations()
            self._threads.finish()
            self._run.mark("finished")
        except Exception as error:
            original = self._threads.original(error)
            if isinstance(original, Enough):
                self._run.mark("stopped", reason=str(original))
                self._run.mark("finished")
            if isinstance(original, Diverged):
                self._run.mark("diverged", reason=str(original))
            raise original from None
        finally:
            with suppress(ray.exceptions.RayError):  # a pool that has died must not hide why the run ends
                self._reporting.spans(self._opponent.spans())
            self._reporting.ends()

    def _iterations(self) -> None:
        opponent, asked = self._opponent, self._ask_for(self._first)
        training = None if self._turns else self._post_training(self._first)
        if not self._run.marks("theta_0"):
            self._threads.start(self._mark_start)
        opponent.start()
        self._audited(self._first, opponent.become(self._first, self._answers(asked), lambda: self._thetas.played(self._first)))
        self._reports.stands(self._first, group=0)
        opponent.evaluate_the_one_before(self._first)
        opponent.release(self._first, {})  # lines 3-5: theta_t answers every prompt
        for t in range(self._first, self._last):
            if self._turns:
                self._turns.give_to(MAIN_PLAYER)
                training = self._post_training(t)
            follow(self._learner, training, self._reports.arrived, self._interrupts)  # line 6
            self._reporting.becomes(t + 1)
            with self._interrupts.graceful():  # a signal here ends the next iteration's training before it begins
                made = self._become_opponent(t + 1, training)
            self._all_trained = t + 1 == self._last
            trained = self._trained(t, made.report)
            self._reports.stands(t + 1, group=made.group)
            opponent.release(t + 1, trained)
            self._threads.start(self._run.mark_checksums, t, self._thetas.folders(t))
            training = made.next_training

    def _mark_start(self) -> None:
        if sha256 := provenance.weights_digest(self._facts):
            self._run.mark("theta_0", sha256=sha256)

    def _post_training(self, t: int) -> int | None:
        """Line 6: theta_{t+1} = argmin over the pairs of iteration t (and t - 1). Posted early: the workers wait for the blocks."""
        if t == self._last:
            return None
        method, overlap = self._method, self._overlap
        return self._learner.post(Train(
            iteration=t, block_sizes=tuple(block.size for block in overlap.blocks(t)), num_epochs=method.num_epochs(t),
            num_steps=overlap.num_steps(t), objective=method.objective(t), lr=method.lr(t), scorer=method.scorer,
            base=self._thetas.first if method.mixes_in_base(t) else None,
            wait_for_all=overlap.waits_for_all, snapshot=overlap.snapshot(t), progress_path=str(self._run.progress(t)),
        ))

    def _ask_for(self, version: int) -> list[int]:
        """Post what the learner has to do before theta_version can be the opponent."""
        return [self._learner.post(command) for command in self._opponent.asks(version)]

    def _become_opponent(self, version: int, training: int) -> Made:
        """theta_{t+1} becomes the opponent: durable on disk, loaded by the samplers, audited, marked.

        If a worker dies on the way, the new group trains iteration t again from what is left, and everything is done again with its
        weights: the report, what is on disk, what the samplers hold and what is marked are always of one and the same theta_{t+1}.
        """
        run, thetas, t, learner, opponent = self._run, self._thetas, version - 1, self._learner, self._opponent
        asked, save = self._ask_for(version), learner.post(thetas.save(t))
        next_training = None if self._turns else self._post_training(version)
        moved = False
        while not moved:
            group = None
            while group != (group := learner.group()):  # again until one and the same group has answered it all
                try:
                    report = self._result(training)
                    on_disk = partial(self._on_disk, t, save, group)
                    audit = opponent.become(version, self._answers([*asked, save]), on_disk)  # while the main player writes its files
                    self._result(save)
                except WeightsLost:
                    if self._turns:
                        self._turns.give_to(MAIN_PLAYER)
                    learner.wait_for_group_after(group)
                except AuditError:
                    if group == learner.group():  # else the samplers hold the weights of a group that has died
                        raise
            masters = str(run.checkpoint(t)) if self._hardware.dtype == "bfloat16" else None
            base = Base(thetas.saved(version), masters, first_command=save + 1, iteration=version)
            moved = self._commit(t, group) and learner.move_base(base, group)
        self._audited(version, audit)
        run.mark(
            "iteration", iteration=t, model=thetas.name(version), opponent=thetas.name(t), report=asdict(report),
            audit=audit and asdict(audit), **opponent.saved(thetas.played(version)), **opponent.made(t),
            **provenance.iteration(self._config, self._method, run, t),
        )
        run.drop_outdated(self._config.run, self._method.needed(version))
        return Made(report, group, next_training)

    def _on_disk(self, t: int, save: int, group: int) -> Saved:
        """Where theta_{t+1} lies, once this group has written it. Raises WeightsLost if a new one makes it anew."""
        self._result(save)
        if not self._commit(t, group):
            raise WeightsLost(f"theta_{t + 1} is made anew")
        return self._thetas.played(t + 1)

    def _commit(self, t: int, group: int) -> bool:
        """Put what iteration t has made in its place; False if a new group of workers is writing it anew already."""
        if self._committed == (t, group):
            return True
        with self._learner.holding(group) as held:
            for folder in (*self._thetas.folders(t), self._run.checkpoint(t)) if held else ():
                self._run.storage.commit(folder)
        self._committed = (t, group) if held else self._committed
        return held

    def _audited(self, version: int, audit: Audit | None) -> None:
        if version < self._last:
            self._first_losses.audited(version, audit)

    def _answers(self, asked: Sequence[int]) -> Iterator[Any]:
        """The learner's to what was posted; where the players take turns, after all of them the opponent has the devices."""
        if not self._turns:
            return map(self._result, asked)
        self._turns.give_to(MAIN_PLAYER)
        answers = [self._result(key) for key in asked]
        self._turns.give_to(OPPONENT)
        return iter(answers)

    def _result(self, key: int) -> Any:
        """What the learner has to answer at an iteration's border, where a new group of workers may train once more first."""
        return follow(self._learner, key, self._reports.arrived, self._interrupts, patience_s=math.inf)

    def _act_on(self, report: StepRecord | Span | Saving | Grouped | Divergence | Proved) -> None:
        """What the learner's workers report, when it is its turn."""
        match report:
            case Proved():
                self._reporting.proved(report)
            case Grouped():
                self._reporting.grouped(report)
            case Span():
                self._reporting.spans([report])
            case StepRecord():
                if report.step == 0:
                    self._first_losses.judge(report.iteration, first_losses(report.metrics))
                self._reporting.step(report)
                self._opponent.stepped(report.metrics["pairs_per_s"])
            case Divergence():
                with self._opponent.voiding_snapshot(report.iteration, report.step) as played_ahead:
                    self._rollbacks.answer(report, played_ahead=played_ahead)

    def _trained(self, t: int, report: TrainReport) -> dict[str, Any]:
        """Iteration t is over; returns what the table says of its training."""
        for record in self._learner.drain():
            self._reports.arrived(record)
        self._first_losses.judge_at_the_end(t, (report.first_loss, report.expected_first_loss))
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
    """The command that trains against it, if it is posted; None: that was the last iteration, or it is not the main player's turn."""
