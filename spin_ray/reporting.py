"""What the user hears of both players: terminal, tracker and timeline, each number once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from spin_ray.background import Threads
from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.learner.messages import Proved, StepRecord, TrainReport
from spin_ray.manifest import RunDir
from spin_ray.overlap import BlockSpec, Overlap
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
        self, config: Config, run: RunDir, chat: ChatFormat, overlap: Overlap, proof: Proof, tracker: Tracker, terminal: Terminal,
    ):
        self._config, self._chat, self._overlap, self.tracker, self.terminal = config, chat, overlap, tracker, terminal
        self._proof = proof
        self._timeline = Timeline(run.path)
        self._plays = {
            t: _Play(sum(block.size for block in overlap.blocks(t))) for t in range(overlap.first, config.spin.num_iterations)
        }
        self._beginning = threading.Lock()
        self._last_metrics: dict[int, Mapping[str, float]] = {}
        """Iteration -> metrics of its newest step."""

    def wait_for(self, answer: Future, threads: Threads, who: str, log: str) -> Any:
        """The answer of a player that is starting; every minute the user hears that it is not there. Raises any thread's first error."""
        begun = time.monotonic()
        while not threads.settled(answer, timeout_s=WAITING_S):
            free = ", ".join(f"{name} {ray.available_resources().get(name, 0):g}" for name in ("CPU", "GPU"))
            self.terminal.say(f"still waiting for {who}, {time.monotonic() - begun:.0f} s by now (free: {free}); see {log}")
        return threads.result(answer)

    def proved(self, proved: Proved) -> None:
        """The learner's part of the proof at the door, which completes it."""
        self.terminal.say(self._proof.line(proved.facts, proved.seconds))

    def spans(self, spans: Iterable[Span]) -> None:
        self._timeline.add(spans)

    def step(self, record: StepRecord) -> None:
        """An optimizer step of the main player."""
        t, step, metrics = record.iteration, record.step, record.metrics
        if step % self._config.tracking.log_every_steps == 0 or step == record.total_steps - 1:
            logged = {**metrics, "global_step": self._overlap.steps_before(t) + step}
            self.tracker.log("train", logged, iteration=t, step=step, opponent_version=t)
        self._last_metrics[t] = metrics
        nll = f"  NLL term {_nll_term(metrics):.3f}" if self._config.spin.nll_weight else ""
        text = f"iteration {t}  step {step + 1}/{record.total_steps}  loss {metrics['spin_loss']:.3f}{nll}  " \
               f"margin {metrics['margin']:.2f}  {metrics['pairs_per_s']:.0f} pairs/s  waited {metrics['waited_s']:.1f} s"
        self.terminal.progress("main player", step + 1, record.total_steps, text)

    def trained(self, t: int, report: TrainReport, *, num_restarts: int) -> dict[str, Any]:
        """Iteration t as a whole, its steps and spans heard; returns what the table says of its training."""
        idle = self._timeline.idle_share(t)
        self.tracker.log("sampler", {"num_restarts": num_restarts}, iteration=t, opponent_version=t)
        rates = {"pairs_per_s": report.num_pairs / report.wall_s, "tokens_per_s": report.num_tokens / report.wall_s}
        self.tracker.log("iteration", {**asdict(report), **rates, "learner_idle_share": idle}, iteration=t, opponent_version=t + 1)
        last = self._last_metrics[t]
        row = {"loss": last["spin_loss"], "margin": last["margin"], "train_s": report.wall_s, "waited_s": report.waited_s}
        return {**row, "nll_term": _nll_term(last)} if self._config.spin.nll_weight else row

    def row(self, version: int, metrics: Mapping[str, float], trained: Mapping[str, Any]) -> None:
        """A version's line of the run's table; `trained`: what `trained` returned of the iteration that made it."""
        optional = {"nll_term": None} if self._config.spin.nll_weight else {}
        self.terminal.row({"model": f"theta_{version}" if version else "SFT", **optional, **metrics, **trained})

    def play_begins(self, t: int) -> None:
        """Iteration t is released, or its first block turns out to be on disk already; only the first call counts."""
        with self._beginning:
            self._plays[t].begun = self._plays[t].begun or time.monotonic()

    def played(self, block: BlockSpec, table: pa.Table) -> None:
        """A block that is finished. Blocks come one after the other, an iteration's in a row."""
        t, play = block.iteration, self._plays[block.iteration]
        play.pairs += len(table)
        play.drawn += 0 if block.kind == "replay" else pc.sum(pc.list_value_length(table.column("generated_ids"))).as_py()
        seconds = max(time.monotonic() - play.begun, 1e-9)
        rate = play.drawn / seconds
        doing = f"{rate:,.0f} tok/s" if play.drawn else "re-scoring"
        self.terminal.progress("opponent", play.pairs, play.total, f"iteration {t}  pairs {play.pairs}/{play.total}  {doing}")
        if play.pairs == play.total:
            self.tracker.log("sampler", {"play_s": seconds, "tokens_per_s": rate}, iteration=t, opponent_version=t)
            self._examples(t, table)

    def draw_timeline(self) -> None:
        """timeline.png: what both players did when, of all sessions of this run."""
        if picture := self._timeline.draw():
            self.tracker.image("timeline", picture)

    def _examples(self, t: int, table: pa.Table) -> None:
        texts = ("prompt_ids", "real_ids", "generated_ids")
        rows = [[t, *(self._chat.decode(row[name]) for name in texts)] for row in table.slice(0, 8).to_pylist()]
        self.tracker.table("pairs", ["iteration", "prompt", "real", "generated"], rows)


def _nll_term(metrics: Mapping[str, float]) -> float:
    """What `spin.nll_weight` adds to SPIN's loss, which alone is l(0) at an iteration's first step."""
    return metrics["loss"] - metrics["spin_loss"]
