"""How far a run is, from its files alone: steps, pairs, seconds, and from the pace so far about how long it will take. No torch, no ray."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from spin_ray.look.stored import Stored, file_names, whole_lines
from spin_ray.methods import method_of
from spin_ray.overlap import Overlap


@dataclass(frozen=True)
class Progress:
    iterations: int
    """Finished ones."""
    num_iterations: int
    step: int | None
    """Optimizer steps of the present iteration that are taken; None: that is not known."""
    num_steps: int | None
    pairs: int | None
    """Of the present iteration, played or re-scored, and on disk."""
    num_pairs: int | None
    begun: float | None
    """Seconds since 1970; None: nothing was done yet."""
    worked_s: float
    """Without the time between an end and going on."""
    left_s: float | None
    """From the pace so far; None: not known, or nothing is left."""


def progress_of(stored: Stored, *, since: float | None, now: float) -> Progress:
    """`since`: when the session that is at work took the run, None: none is; `now`: the time. Both by the clock of that session's host."""
    method, done = method_of(stored.config), len(stored.marks("iteration"))
    sizes = next((mark["block_sizes"] for mark in stored.marks("prepared")[-1:]), None)
    begun, worked = _times(stored, since, now)
    if sizes is None:
        return Progress(done, method.num_iterations, None, None, None, None, begun, worked, None)
    overlap = Overlap(stored.config, method, sizes)
    if done >= method.num_iterations:
        return Progress(done, method.num_iterations, None, None, None, None, begun, worked, None)
    pairs, num_pairs = _pairs(stored, overlap, done) if method.plays else (None, None)
    left = None if since is None else _left(stored, since, now, sum(map(overlap.num_steps, range(method.num_iterations))))
    return Progress(
        done, method.num_iterations, _step(stored, done), overlap.num_steps(done), pairs, num_pairs, begun, worked, left
    )


def _pairs(stored: Stored, overlap: Overlap, t: int) -> tuple[int, int]:
    blocks = overlap.blocks(t)
    there = set(file_names(stored, stored.run.iteration(t) / "pairs"))
    played = sum(block.size for block in blocks if stored.run.pairs(t, block.kind, block.index).name in there)
    return played, sum(block.size for block in blocks)


def steps_of(stored: Stored) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that tell of an optimizer step, oldest first."""
    return [line for line in stored.metrics if "train/global_step" in line and "time" in line]


def _step(stored: Stored, t: int) -> int:
    last = next((line["step"] + 1 for line in reversed(steps_of(stored)) if line.get("iteration") == t), 0)
    return max(last, _saved_steps(stored, t))


def _saved_steps(stored: Stored, t: int) -> int:
    """Those that the progress on disk holds: an earlier session's, of which the metrics may know less."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(stored.run.storage.read(stored.run.progress(t) / "count.json"))["steps"])
    return 0


def _left(stored: Stored, since: float, now: float, num_steps: int) -> float | None:
    """Seconds for the steps that are left, at this session's pace: all the time since its first line counts."""
    lines = [line for line in stored.metrics if line.get("time", 0) >= since]
    steps = [line for line in lines if "train/global_step" in line]
    if not steps:
        return None
    taken = steps[-1]["train/global_step"] - steps[0]["train/global_step"] + 1
    elapsed = max(now, lines[-1]["time"]) - lines[0]["time"]
    left = num_steps - steps[-1]["train/global_step"] - 1
    return max(0.0, elapsed / taken * left) if taken > 1 else None


def _times(stored: Stored, since: float | None, now: float) -> tuple[float | None, float]:
    """When the run was begun, and the seconds of all its sessions together."""
    spans = list(whole_lines(stored.read("timeline.jsonl")))
    starts = sorted(mark["started"] for mark in stored.marks("session")) or sorted(_first_of_sessions(spans))
    times = [line["time"] for line in stored.metrics if "time" in line]
    times += itertools.chain.from_iterable((span["begin"], span["end"]) for span in spans if {"begin", "end"} <= span.keys())
    times = sorted([*times, *starts, *([since, now] if since is not None else [])])
    if not times:
        return None, 0.0
    borders = [*starts[1:], float("inf")]
    worked, rest = 0.0, times
    for border in borders:
        own = [at for at in rest if at < border]
        worked += own[-1] - own[0] if own else 0.0
        rest = rest[len(own) :]
    return times[0], worked


def _first_of_sessions(spans: Sequence[dict[str, Any]]) -> list[float]:
    first: dict[int, float] = {}
    for span in spans:
        if {"session", "begin"} <= span.keys():
            first[span["session"]] = min(span["begin"], first.get(span["session"], span["begin"]))
    return list(first.values())

