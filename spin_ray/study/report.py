"""What a part of the study shows: its table and its picture, from the lines alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spin_ray.heldout import standard_error
from spin_ray.study.arms import Arm, Part
from spin_ray.study.lines import Line, Lines
from spin_ray.study.picture import Curve, draw_curves, draw_grid

COLUMNS = (
    ("right_probability", "right at T=1", 3), ("exact_match_greedy_share", "right, greedy", 3), ("human_similarity", "like human ones", 3),
    ("human_distance", "far from human ones", 3), ("real_nll_nats_per_token", "NLL of y", 3), ("generated_tokens", "tokens", 1),
    ("advantage_accuracy", "y told from y'", 3), ("kl_from_start_nats_per_token", "KL from theta_0", 3),
)
"""Metric, head of its column, digits."""

Find = Callable[..., list[Line]]
"""find(arm's name, point) -> its runs there; without a point, at any."""


@dataclass(frozen=True)
class Value:
    """Mean over seeds, with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        return cls(float(np.mean(values)), standard_error(np.array(values)))

    def shown(self, digits: int) -> str:
        return f"{self.mean:.{digits}f}" + (f" ± {self.error:.{digits}f}" if np.isfinite(self.error) else "")


def report(part: Part, arms: Mapping[str, Arm], lines: Lines, out: Path, settings: tuple[str, ...]) -> str:
    """Draw the part's picture into `out`, put its table into the document beside it, and return it.

    `settings`: what changes the results on the study's command line; runs with others belong to another study in the same file.
    """
    find = partial(_lines_of, arms, lines, settings)
    table = {"curve": _curve_table, "grid": _grid_table, "forecast": _forecast_table}[part.kind](part, arms, find)
    text = table
    if draw := {"curve": _draw_curves, "grid": _draw_grid}.get(part.kind):
        draw(part, arms, find, out / f"{part.name}.png")
        text += f"\n![{part.question}]({out.name}/{part.name}.png)\n"
    _put(out.parent / f"{out.name}.md", part, text)
    return table


def _put(document: Path, part: Part, text: str) -> None:
    """Between the part's marks; a document without them gets a section for it."""
    begin, end = f"<!-- {part.name} -->\n", f"<!-- end of {part.name} -->\n"
    before = document.read_text() if document.exists() else "# The study\n"
    if begin not in before or end not in before:
        before += f"\n## {part.question}\n{begin}{end}"
    document.write_text(before[: before.index(begin)] + begin + text + before[before.index(end) :])


def _curve_table(part: Part, arms: Mapping[str, Arm], find: Find) -> str:
    found = {name: find(name) for name in part.arms}
    every = [line for those in found.values() for line in those]
    shown = [column for column in COLUMNS if any(column[0] in metrics for line in every for metrics in line.versions.values())]
    rows = [["", "lr", "steps", *(head for _, head, _ in shown), "training, min", "seeds"]]
    rows.append(["theta_0", "", "0", *_cells([line.versions[0] for line in every if 0 in line.versions], shown), "", ""])
    for name, those in found.items():
        last = max((max(line.versions, default=0) for line in those), default=0)
        for version in range(1, last + 1):
            reached = [line for line in those if version in line.versions]
            minutes = Value.of([sum(training["wall_s"] for training in line.trainings[:version]) / 60 for line in reached])
            rows.append([
                arms[name].says + (f", theta_{version}" if last > 1 else ""), _rate(arms[name], those[0]), str(reached[0].steps(version)),
                *_cells([line.versions[version] for line in reached], shown), f"{minutes.mean:.1f}", _seeds(reached, those),
            ])
        if those and not last:
            rows.append([arms[name].says, _rate(arms[name], those[0]), "", *[""] * len(shown), "", _seeds([], those)])
    return _markdown(rows)


def _cells(versions: Sequence[Mapping[str, float]], shown: Iterable[tuple[str, str, int]]) -> list[str]:
    cells = []
    for name, _, digits in shown:
        values = [metrics[name] for metrics in versions if name in metrics]
        cells.append(Value.of(values).shown(digits) if values else "")
    return cells


def _grid_table(part: Part, arms: Mapping[str, Arm], find: Find) -> str:
    points = arms[part.arms[0]].points
    starts = [line.score(0) for name in part.arms for line in find(name) if 0 in line.versions]
    start = f" (theta_0: {Value.of(starts).shown(3)})" if starts else ""
    rows = [[f"right at T=1{start}", *(_in_words(point) for point in points)]]
    for name in part.arms:
        rows.append([arms[name].says, *(_cell(find(name, point)) for point in points)])
    return _markdown(rows)


def _forecast_table(part: Part, arms: Mapping[str, Arm], find: Find) -> str:
    """What the probe says of the point of its grid that is nearest, and what the runs did there."""
    rows = [["probe of", "point", "forecast", "its NLL change", "right at T=1 and NLL of the runs"]]
    for name in part.arms:
        forecast = arms[arms[name].forecasts]
        for line in find(name):
            for point in forecast.points:
                one = min(line.tries, key=lambda one, point=point: _distance(one, point))
                at = f"{one['verdict']} (lr {one['lr']:.2g}, beta {one['beta']:.2g})"
                told = _cell(find(forecast.name, point))
                rows.append([forecast.says, _in_words(point), at, f"{one['nll_change_nats_per_token']:+.2f}", told])
    return _markdown(rows)


def _distance(one: Mapping[str, Any], point: Sequence[str]) -> float:
    """Between a try and a point of a grid, in factors."""
    values = {key.split(".")[-1]: float(value) for key, value in (setting.split("=") for setting in point)}
    return sum(abs(math.log(one[key] / values[key])) for key in values)


def _cell(those: Sequence[Line]) -> str:
    """The last version's probability of the right answer, the change of NLL, and how many of the runs have collapsed."""
    if not those:
        return ""
    collapsed = sum(line.state == "collapsed" for line in those)
    told = [line for line in those if len(line.versions) > 1]
    if not told:
        return f"collapsed {collapsed}/{len(those)}"
    right = Value.of([line.score(line.last) for line in told])
    nll = np.mean([_nll(line, line.last) - _nll(line, 0) for line in told])
    return f"{right.shown(3)}; NLL {nll:+.2f}" + (f"; **collapsed {collapsed}/{len(those)}**" if collapsed else "")


def _nll(line: Line, version: int) -> float:
    return line.versions[version]["real_nll_nats_per_token"]


def _draw_curves(part: Part, arms: Mapping[str, Arm], find: Find, path: Path) -> None:
    """The metric that counts over optimizer steps, an arm a curve, or several that differ by their steps."""
    found = {name: find(name) for name in part.arms}
    known = {key for those in found.values() for line in those for metrics in line.versions.values() for key in metrics}
    metric, head, _ = next((column for column in COLUMNS if column[0] in known), COLUMNS[0])
    reached: dict[str, dict[int, list[float]]] = {}
    for name, those in found.items():
        values = reached.setdefault(arms[name].curve or _plain(arms[name]), {})
        for line in those:
            for version, metrics in line.versions.items():
                values.setdefault(line.steps(version), []).append(metrics[metric])
    curves = []
    for label, values in reached.items():
        steps, means = sorted(values), {step: Value.of(those) for step, those in values.items()}
        curves.append(Curve(label, steps, [means[step].mean for step in steps], [means[step].error for step in steps]))
    draw_curves([curve for curve in curves if curve.xs], part.question, head, path)


def _draw_grid(part: Part, arms: Mapping[str, Arm], find: Find, path: Path) -> None:
    points = arms[part.arms[0]].points
    cells = [[find(name, point) for point in points] for name in part.arms]
    values = [[_mean_gain(those) for those in row] for row in cells]
    collapsed = [[sum(line.state == "collapsed" for line in those) for those in row] for row in cells]
    draw_grid(values, collapsed, [_plain(arms[name]) for name in part.arms], [_in_words(p) for p in points], part.question, path)


def _mean_gain(those: Sequence[Line]) -> float:
    """Right answers won per prompt since theta_0; not a number where there are none to compare."""
    gains = [line.score(line.last) - line.score(0) for line in those if len(line.versions) > 1]
    return float(np.mean(gains)) if gains else float("nan")


def _lines_of(
    arms: Mapping[str, Arm], lines: Lines, settings: tuple[str, ...], name: str, point: tuple[str, ...] | None = None
) -> list[Line]:
    """The arm's runs that count, at one of its points or at any; not those of an arm that had this name and was another one."""
    arm = arms[name]
    begins = [(*arm.settings, *settings, *at) for at in (arm.points if point is None else [point])]
    more = 1 if arm.rate else 0  # the rate comes last
    return [line for line in lines.of_arm(name) if line.settings[: len(line.settings) - more] in begins]


def _plain(arm: Arm) -> str:
    return arm.says.replace("`", "")


def _rate(arm: Arm, line: Line) -> str:
    return next((setting.split("=")[1] for setting in line.settings if arm.rate and setting.startswith(f"{arm.rate}=")), "")


def _seeds(reached: Sequence[Line], those: Sequence[Line]) -> str:
    """How many runs a row is the mean of, and how many of all have collapsed, now or later."""
    collapsed = sum(line.state == "collapsed" for line in those)
    return f"{len(reached)}" + (f", {collapsed} of {len(those)} collapsed" if collapsed else "")


def _in_words(point: Sequence[str]) -> str:
    pairs = (setting.split("=", 1) for setting in point)
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in pairs)


def _markdown(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
