"""When each player was busy and with what: spans in timeline.jsonl, a picture in timeline.png.

A run may have several sessions (it was resumed); the picture sets them side by side without the time between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from spin_ray.records import Span

COLOURS = {
    "train": "#2a7f4f", "score": "#8fc7a4", "play": "#2f6db3", "evaluate": "#a9c6e8", "audit": "#7d5ba6",
    "publish": "#e08a1e", "load": "#e08a1e", "save": "#c9a227",
}
IDLE = "#f2f0ec"
MOST_ROWS = 16
SAME_S = 0.02
"""Spans of one activity that are no further apart are drawn as one."""


class Timeline:
    """The spans of one run, appended to its timeline.jsonl."""

    def __init__(self, run_path: Path):
        self._file, self._picture = run_path / "timeline.jsonl", run_path / "timeline.png"
        self._earlier = [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.exists() else []
        self._session = 1 + max((entry["session"] for entry in self._earlier), default=-1)
        self._spans: list[Span] = []

    def add(self, spans: Iterable[Span]) -> None:
        spans = list(spans)
        self._spans += spans
        with self._file.open("a") as file:
            file.writelines(json.dumps({"session": self._session, **asdict(span)}) + "\n" for span in spans)

    def idle_share(self, iteration: int) -> float:
        """Share of an iteration in which the main player did nothing: from the end of the last training to the end of this one."""
        own = [span for span in self._spans if span.player == "main player"]
        trained = [span for span in own if span.activity == "train" and span.iteration <= iteration]
        end = max(span.end for span in trained)
        begin = max((span.end for span in trained if span.iteration < iteration), default=min(span.begin for span in trained))
        busy = sum(max(0.0, min(span.end, end) - max(span.begin, begin)) for span in own)
        return 1 - busy / (end - begin)

    def draw(self) -> Path | None:
        """Write timeline.png, a row per player; None if nothing happened yet."""
        sessions: dict[int, list[Span]] = {}
        for entry in [*self._earlier, *({"session": self._session, **asdict(span)} for span in self._spans)]:
            sessions.setdefault(entry.pop("session"), []).append(Span(**entry))
        if not sessions:
            return None
        begins = [min(span.begin for span in spans) for spans in sessions.values()]
        lengths = [max(span.end for span in spans) - begin for spans, begin in zip(sessions.values(), begins, strict=True)]
        shifts = [sum(lengths[:k]) - begin for k, begin in enumerate(begins)]
        spans = [
            Span(span.player, span.activity, span.iteration, span.begin + shift, span.end + shift)
            for shift, own in zip(shifts, sessions.values(), strict=True) for span in own
        ]
        _draw(merged(spans), self._picture, borders=[sum(lengths[:k]) for k in range(1, len(lengths))])
        return self._picture


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

    opponents = sorted({span.player for span in spans} - {"main player"}, key=lambda name: (len(name), name))
    rows = ["main player", *opponents[:MOST_ROWS]][::-1]
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
