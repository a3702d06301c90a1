"""When each player was busy and with what: spans in timeline.jsonl, a picture in timeline.png.

A run may have several sessions (it was resumed); the picture sets them side by side without the time between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from spin_ray.records import Span
from spin_ray.storage import readable_disk_errors

COLOURS = {
    "train": "#2a7f4f", "score": "#8fc7a4", "play": "#2f6db3", "evaluate": "#a9c6e8", "audit": "#7d5ba6",
    "publish": "#e08a1e", "load": "#b3541e", "save": "#c9a227",
    "sleep": "#8a8f98", "rest": "#8a8f98", "wake": "#5f6670",
}
IDLE = "#f2f0ec"
MOST_ROWS = 16
SAME_S = 0.02
"""Spans of one activity that are no further apart are drawn as one."""


MAIN_PLAYER = "main player"


class Timeline:
    """The spans of one run, appended to its timeline.jsonl."""

    def __init__(self, run_path: Path):
        self._run_path = run_path
        self._earlier = _read(run_path)
        self._session = 1 + max((session for session, _ in self._earlier), default=-1)
        self._spans: list[Span] = []

    def add(self, spans: Iterable[Span]) -> None:
        spans = list(spans)
        self._spans += merged(spans)  # the file has every one; an iteration's thousands of answers need not stay in memory
        file = self._run_path / "timeline.jsonl"
        with readable_disk_errors(file), file.open("a") as lines:
            lines.writelines(json.dumps({"session": self._session, **asdict(span)}) + "\n" for span in spans)

    def idle_share(self, iteration: int) -> float:
        """Share of an iteration in which the main player did nothing."""
        return idle_share(self._spans, MAIN_PLAYER, *iteration_windows(self._spans)[iteration])

    def draw(self) -> Path | None:
        """Write timeline.png, a row per player; None if nothing happened yet."""
        spans, borders = _laid_out([*self._earlier, *((self._session, span) for span in self._spans)])
        if not spans:
            return None
        picture = self._run_path / "timeline.png"
        _draw(merged(spans), picture, borders=borders)
        return picture


def laid_out(lines: bytes) -> tuple[list[Span], list[float]]:
    """All spans of a timeline.jsonl in seconds since the run began, without the time between its sessions; and where sessions meet."""
    return _laid_out(_parsed(lines))


def _laid_out(entries: Iterable[tuple[int, Span]]) -> tuple[list[Span], list[float]]:
    sessions: dict[int, list[Span]] = {}
    for session, span in entries:
        sessions.setdefault(session, []).append(span)
    begins = [min(span.begin for span in spans) for spans in sessions.values()]
    lengths = [max(span.end for span in spans) - begin for spans, begin in zip(sessions.values(), begins, strict=True)]
    shifts = [sum(lengths[:k]) - begin for k, begin in enumerate(begins)]
    spans = [
        Span(span.player, span.activity, span.iteration, span.begin + shift, span.end + shift)
        for shift, own in zip(shifts, sessions.values(), strict=True) for span in own
    ]
    return spans, [sum(lengths[:k]) for k in range(1, len(lengths))]


def read_spans(run_path: Path) -> list[Span]:
    """All spans of a run."""
    return [span for _, span in _read(run_path)]


def _read(run_path: Path) -> list[tuple[int, Span]]:
    file = run_path / "timeline.jsonl"
    return _parsed(file.read_bytes()) if file.exists() else []


def _parsed(lines: bytes) -> list[tuple[int, Span]]:
    entries = []
    for line in lines.splitlines():
        with suppress(json.JSONDecodeError):  # a line that a crash cut short, and what was written behind it
            entries.append(json.loads(line))
    return [(entry.pop("session"), Span(**entry)) for entry in entries]


def iteration_windows(spans: Iterable[Span]) -> dict[int, tuple[float, float]]:
    """Iteration -> (begin, end): from the end of the training before it, or the first play, to the end of its own."""
    spans = list(spans)
    trained: dict[int, float] = {}
    for span in spans:
        if span.activity == "train":
            trained[span.iteration] = max(span.end, trained.get(span.iteration, span.end))
    first = min(trained)
    played = [span.begin for span in spans if span.activity in ("play", "train") and span.iteration == first]
    begins = [min(played), *(trained[t] for t in sorted(trained))]
    return {t: (begin, trained[t]) for t, begin in zip(sorted(trained), begins, strict=False)}


def shares(spans: Iterable[Span], players: Sequence[str], begin: float, end: float, order: Sequence[str]) -> dict[str, float]:
    """Activity -> the share of the time from `begin` to `end` that players spend on it, on average; "wait" is what is left.

    Where one does two things at once, the one that comes first in `order` counts.
    """
    spans, found, taken = list(spans), {}, {player: [] for player in players}
    for activity in order:
        gained = 0.0
        for player in players:
            before = _covered(taken[player], begin, end)
            taken[player] = [*taken[player], *(span for span in spans if (span.player, span.activity) == (player, activity))]
            gained += _covered(taken[player], begin, end) - before
        found[activity] = gained / (end - begin) / max(1, len(players))
    return {**found, "wait": max(0.0, 1 - sum(found.values()))}


def idle_share(spans: Iterable[Span], player: str, begin: float, end: float) -> float:
    """Share of the time from `begin` to `end` in which a player did nothing."""
    return 1 - _covered([span for span in spans if span.player == player], begin, end) / (end - begin)


def _covered(spans: Iterable[Span], begin: float, end: float) -> float:
    """Seconds from `begin` to `end` in which at least one of the spans goes on."""
    busy, until = 0.0, begin
    for start, stop in sorted((max(span.begin, begin), min(span.end, end)) for span in spans if span.end > begin and span.begin < end):
        busy += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return busy


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans of one player and activity that overlap or touch, as one."""
    result: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.player, span.activity, span.begin)):
        last = result[-1] if result else None
        same = last and (last.player, last.activity, last.iteration) == (span.player, span.activity, span.iteration)
        if same and span.begin <= last.end + SAME_S:
            result[-1] = Span(last.player, last.activity, last.iteration, last.begin, max(last.end, span.end))
        else:
            result.append(span)
    return result


def _draw(spans: Sequence[Span], path: Path, *, borders: Sequence[float]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    opponents = sorted({span.player for span in spans} - {MAIN_PLAYER}, key=lambda name: (len(name), name))
    rows = [MAIN_PLAYER, *opponents[:MOST_ROWS]][::-1]
    end = max(span.end for span in spans)
    figure = Figure(figsize=(14, 1.6 + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    used = [activity for activity in COLOURS if any(span.activity == activity for span in spans)]
    for height, player in enumerate(rows):
        axes.broken_barh([(0, end)], (height - 0.36, 0.72), facecolors=IDLE)
        for activity in sorted(used, key=lambda name: name in ("play", "load")):  # play above the evaluation that rides on it
            bars = [(span.begin, span.end - span.begin) for span in spans if (span.player, span.activity) == (player, activity)]
            axes.broken_barh(bars, (height - 0.36, 0.72), facecolors=COLOURS[activity])
    for t in sorted({span.iteration for span in spans if span.activity == "train"}):
        trained = [span for span in spans if span.activity == "train" and span.iteration == t]
        begin, finish = min(span.begin for span in trained), max(span.end for span in trained)
        axes.axvline(finish, color="black", linewidth=0.8, linestyle=":")
        axes.text((begin + finish) / 2, len(rows) - 0.55, f"iteration {t}", ha="center", va="bottom", fontsize=9)
    for border in borders:
        axes.axvline(border, color="#b03a2e", linewidth=1.2)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.6, len(rows) - 0.1)
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds" + ("; a red line: the run was resumed" if borders else ""))
    axes.spines[["top", "right", "left"]].set_visible(False)
    patches = [Patch(color=COLOURS[activity], label=activity) for activity in used]
    patches.append(Patch(facecolor=IDLE, edgecolor="#cccccc", label="idle"))
    axes.legend(handles=patches, ncols=len(patches), loc="lower center", bbox_to_anchor=(0.5, 1.02), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
