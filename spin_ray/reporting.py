"""What the user hears of both players: terminal, tracker and timeline, each number once."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from spin_ray.background import Threads
from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.data.progress import time_left
from spin_ray.errors import WeightsLate
from spin_ray.exchange.pairs import Played, read_pairs
from spin_ray.learner.messages import Grouped, Proved, StepRecord, TrainReport
from spin_ray.manifest import RunDir
from spin_ray.methods import Method
from spin_ray.overlap import BlockSpec, Overlap
from spin_ray.pages import Pages
from spin_ray.preflight import Proof
from spin_ray.records import Span
from spin_ray.terminal import Terminal
from spin_ray.timeline import Timeline
from spin_ray.tracking import Tracker

WAITING_S = 60.0


@dataclass
class _Play:
    """How far the opponent has got with an iteration."""

    total: int
    pairs: int = 0
    drawn: int = 0
    """Tokens sampled."""
    begun: float = 0.0
    """Monotonic seconds; 0: not yet."""


class Reporting:
    """Thread-safe: the main thread reports the main player, others the opponent."""

    def __init__(
        self, config: Config, method: Method, run: RunDir, chat: ChatFormat, overlap: Overlap, proof: Proof, tracker: Tracker,
        terminal: Terminal, pages: Pages | None = None,
    ):
        """`pages`: what is written for people into the run's folder; None: nothing is."""
        self._pages = pages
        self._config, self._method, self._run, self._chat, self._overlap = config, method, run, chat, overlap
        self.tracker, self.terminal = tracker, terminal
        self._proof = proof
        self._timeline = Timeline(run.path)
        self._plays = {
            t: _Play(sum(block.size for block in overlap.blocks(t))) for t in range(overlap.first, method.num_iterations)
        }
        self._from_sft = config.method != "sft"
        """Whether theta_0 is an SFT model."""
        terms = {term for t in range(method.num_iterations) for term in method.objective(t).terms}
        self._trained_columns = {*terms, "train_s", "waited_s", *(["advantage_accuracy"] if config.data.eval else [])}
        self._beginning = threading.Lock()
        self._steps: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        """Iteration -> metrics of its steps in this session."""
        self._since: tuple[int, int, float] | None = None
        """Iteration that is trained, steps that it had when it was first heard of, and when that was (monotonic seconds)."""

    def wait_for(self, answer: Future, threads: Threads, who: str, log: str) -> Any:
        """The answer of a player that is starting; every minute the user hears that it is not there. Raises any thread's first error."""
        begun = time.monotonic()
        self.terminal.status(f"waiting for {who}")
        while not threads.settled(answer, timeout_s=WAITING_S):
            free = ", ".join(f"{name} {ray.available_resources().get(name, 0):g}" for name in ("CPU", "GPU"))
            self.terminal.say(f"still waiting for {who}, {time.monotonic() - begun:.0f} s by now (free: {free}); see {log}")
        self.terminal.status("")
        return threads.result(answer)

    def becomes(self, version: int) -> None:
        """theta_version is trained: it is written, and brought to the samplers."""
        self.terminal.progress("main player", 1, 1, f"iteration {version - 1}  trained; theta_{version} is exported and loaded")

    def proved(self, proved: Proved) -> None:
        """The learner's part of the proof at the door, which completes it."""
        self.terminal.say(self._proof.line(proved.facts, proved.seconds))

    def grouped(self, grouped: Grouped) -> None:
        """A group of the learner's workers begins, of a number that was chosen by what is free."""
        self.terminal.say(f"main player  {grouped.num_workers} worker{'s' * (grouped.num_workers > 1)}")
        self.tracker.log("learner", {"num_workers": grouped.num_workers})

    def spans(self, spans: Iterable[Span]) -> None:
        self._timeline.add(spans)

    def step(self, record: StepRecord) -> None:
        """An optimizer step of the main player."""
        t, step, metrics = record.iteration, record.step, record.metrics
        if step % self._config.tracking.log_every_steps == 0 or step == record.total_steps - 1:
            logged = {name: value for name, value in metrics.items() if not isinstance(value, list)}  # histograms are an iteration's
            logged |= {"global_step": self._overlap.steps_before(t) + step}
            self.tracker.log("train", logged, iteration=t, step=step, opponent_version=t)
        del self._steps[t][step:]  # a group of workers that replaces another takes steps again
        self._steps[t].append(metrics)
        learnt = "  ".join(f"{name} {value:.3f}" for name, value in _learnt(metrics).items())
        text = f"iteration {t}  step {step + 1}/{record.total_steps}  {learnt}  {metrics['pairs_per_s']:.0f} pairs/s  " \
               f"waited {metrics['waited_s']:.1f} s{self._left(t, step + 1, record.total_steps)}"
        self.terminal.progress("main player", step + 1, record.total_steps, text)

    def _left(self, t: int, done: int, total: int) -> str:
        """How long iteration t's training will go on, by its steps in this session."""
        if not self._since or self._since[0] != t:
            self._since = t, done, time.monotonic()
        _, before, begun = self._since
        return time_left(done - before, total - before, time.monotonic() - begun)

    def trained(self, t: int, report: TrainReport, *, num_restarts: int) -> dict[str, Any]:
        """Iteration t as a whole, its steps and spans heard; returns what the table says of its training."""
        idle = self._timeline.idle_share(t)
        self.tracker.log("sampler", {"num_restarts": num_restarts}, iteration=t, opponent_version=t)
        rates = {"pairs_per_s": report.num_pairs / report.wall_s, "tokens_per_s": report.num_tokens / report.wall_s}
        steps = self._steps.pop(t)
        last_epoch = _means(steps[-max(1, report.num_steps // self._method.num_epochs(t)) :])
        whole = {**asdict(report), **rates, "learner_idle_share": idle, **last_epoch}
        self.tracker.log("iteration", whole, iteration=t, opponent_version=t + 1)
        return {**_learnt(steps[-1]), "train_s": report.wall_s, "waited_s": report.waited_s}

    def row(self, version: int, metrics: Mapping[str, float], trained: Mapping[str, Any]) -> None:
        """A version's line of the run's table; `trained`: what `trained` returned of the iteration that made it."""
        self.terminal.row({"model": self._name(version), **metrics, **trained}, self._trained_columns)
        if self._pages:
            self._pages.stands(version)
            self.tracker.table("answers", *self._pages.answers())
            self.tracker.model(version, *self._pages.model(version), metrics)

    def tasks(self, version: int, metrics: Mapping[str, float], text: str) -> None:
        """A version's numbers on `eval.tasks`."""
        self.tracker.log("tasks", metrics, opponent_version=version)
        self.terminal.say(f"{self._name(version)}: {text}")
        if self._pages:
            self._pages.stands(version)

    def _name(self, version: int) -> str:
        return f"theta_{version}" if version or not self._from_sft else "SFT"

    def play_begins(self, t: int) -> None:
        """Iteration t is released, or its first block turns out to be on disk already; only the first call counts."""
        with self._beginning:
            self._plays[t].begun = self._plays[t].begun or time.monotonic()

    def played(self, block: BlockSpec, played: Played, path: Path) -> None:
        """A block that is finished, and lies at `path`. Blocks come one after the other, an iteration's in a row."""
        t, play = block.iteration, self._plays[block.iteration]
        play.pairs += played.num_pairs
        play.drawn += 0 if block.age else played.num_drawn
        seconds = max(time.monotonic() - play.begun, 1e-9)
        rate = play.drawn / seconds
        doing = f"{rate:,.0f} tok/s" if play.drawn else "re-scoring"
        left = time_left(play.pairs, play.total, seconds)
        self.terminal.progress("opponent", play.pairs, play.total, f"iteration {t}  pairs {play.pairs}/{play.total}  {doing}{left}")
        if play.pairs == play.total:
            self.tracker.log("sampler", {"play_s": seconds, "tokens_per_s": rate}, iteration=t, opponent_version=t)
            self._examples(t, read_pairs(path, self._run.storage))

    def weights_late(self, error: WeightsLate) -> None:
        self.terminal.say(f"{error}; the samplers read them in the run directory, as soon as they are there")

    def resized(self, samplers: int, need: float, t: int | None) -> None:
        """There are so many samplers from now on, those that start with them."""
        self.terminal.say(f"samplers: {samplers} from now on; {need:.2f} would keep up with the main player")
        self.tracker.log("sampler", {"num_replicas": samplers, "needed_replicas": need}, iteration=t)

    def fell_back(self, failed: Sequence[str]) -> int:
        """New weights that did not get to samplers by `weights.transport`; how many of them."""
        for what in failed:
            self.terminal.say(f"{what}; its process starts anew and fetches them from the object store; see logs/sender.log")
        return len(failed)

    def ends(self) -> None:
        """The run, or this session of it: draw timeline.png, of all sessions, and write the report for the last time."""
        if picture := self._timeline.draw():
            self.tracker.image("timeline", picture)
        if self._pages:
            self._pages.write()
            self.tracker.file(self._pages.report)
            self._pages.conclude()

    def _examples(self, t: int, table: pa.Table) -> None:
        texts = ("prompt_ids", "real_ids", "generated_ids")
        rows = [[t, *(self._chat.decode(row[name]) for name in texts)] for row in table.slice(0, 8).to_pylist()]
        self.tracker.table("pairs", ["iteration", "prompt", "real", "generated"], rows)


LAST_EPOCH = (
    "accuracy", "margin", "displaced_share", "lower_likelihood_share", "real_logp_change_nats", "generated_logp_change_nats",
    "real_nll_nats_per_token", "margin_histogram",
)
"""What an iteration's training came to: means over its last epoch, each pair before the step that it is in."""


def _means(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"last_epoch_{name}": np.mean([step[name] for step in steps], axis=0).tolist() for name in LAST_EPOCH if name in steps[-1]
    }


def _learnt(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a step's metrics say of the objective's terms: the loss of pairs, l(0) at an iteration's first step, apart from the NLL term."""
    if "pair_loss" not in metrics:
        return {"NLL": metrics["real_nll_nats_per_token"]}
    term = metrics["loss"] - metrics["pair_loss"]
    return {"loss": metrics["pair_loss"], **({"NLL term": term} if term else {}), "margin": metrics["margin"]}
