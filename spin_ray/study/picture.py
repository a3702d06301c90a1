"""Pictures of many runs. The drawing library is loaded when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_ray.study.search import Range, Search


def draw_search(results: Sequence[dict[str, Any]], search: Search, metric: str, path: Path) -> None:
    """The metric over the first two ranges of a search; a collapsed trial is a cross, whatever number it may have."""
    axes = [key for key, values in search.space.items() if isinstance(values, Range)][:2] or list(search.space)[:1]
    plt = _pyplot()
    figure, plot = plt.subplots(figsize=(7, 5), layout="constrained")
    marks = {"finished": "o", "pruned": "s"}
    known = [result["value"] for result in results if result["value"] is not None and result["state"] in marks]
    limits = (min(known), max(known)) if known else (0, 1)
    drawn = None
    for state, mark in marks.items():
        those = [result for result in results if result["state"] == state and result["value"] is not None]
        xs, ys = _places(those, search.space, axes, limits[0])
        if those:
            drawn = plot.scatter(
                xs, ys, c=[result["value"] for result in those], marker=mark, s=110, vmin=limits[0], vmax=limits[1], cmap="viridis",
                label=state, edgecolors="black", linewidths=0.6,
            )
    if died := [result for result in results if result["state"] == "collapsed"]:
        plot.scatter(*_places(died, search.space, axes, limits[0]), marker="X", s=110, color="crimson", label="collapsed")
    for key, scale in zip(axes, (plot.set_xscale, plot.set_yscale), strict=False):
        values = search.space[key]
        if isinstance(values, Range) and values.log:
            scale("log")
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1] if len(axes) > 1 else metric)
    if drawn is not None:
        figure.colorbar(drawn, label=metric)
    if results:
        plot.legend(title="trial")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _places(results: Sequence[dict[str, Any]], space: dict[str, Range | list[Any]], axes: Sequence[str], unknown: float) -> tuple[Any, Any]:
    """Where trials stand; with one axis the other is their value, or `unknown`. Choices that are not all numbers have names for places."""
    numbers = {key: isinstance(space[key], Range) or all(type(value) in (int, float) for value in space[key]) for key in axes}
    xs, *ys = ([value if numbers[key] else str(value) for value in (result["params"][key] for result in results)] for key in axes)
    return xs, ys[0] if ys else [unknown if result["value"] is None else result["value"] for result in results]


@dataclass(frozen=True)
class Curve:
    label: str
    xs: list[float]
    ys: list[float]
    errors: list[float]


def draw_curves(curves: Sequence[Curve], title: str, metric: str, path: Path) -> None:
    """A metric over optimizer steps, with standard errors."""
    plt = _pyplot()
    figure, plot = plt.subplots(figsize=(8, 5), layout="constrained")
    for curve, style in zip(curves, _STYLES * (1 + len(curves) // len(_STYLES)), strict=False):
        marker, line = style
        plot.errorbar(curve.xs, curve.ys, yerr=curve.errors, label=curve.label, marker=marker, linestyle=line, capsize=3, markersize=5)
    plot.set_title(title)
    plot.set_xlabel("optimizer steps")
    plot.set_ylabel(metric)
    plot.grid(alpha=0.3)
    if curves:
        plot.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


_STYLES = [(marker, line) for line in ("-", "--") for marker in "osD^v"]


def draw_grid(
    values: Sequence[Sequence[float]], collapsed: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], title: str,
    path: Path,
) -> None:
    """Right answers won (or lost) in every cell, and how many runs have collapsed; a cell without runs stays white."""
    plt = _pyplot()
    figure, plot = plt.subplots(figsize=(2.6 + 1.5 * len(columns), 1.6 + 0.42 * len(rows)), layout="constrained")
    image = plot.imshow(values, cmap="RdYlGn", vmin=-0.2, vmax=0.2, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            died = f"\n{collapsed[row][column]} collapsed" if collapsed[row][column] else ""
            said = f"{'' if math.isnan(value) else f'{value:+.2f}'}{died}".strip()
            plot.text(column, row, said, ha="center", va="center", fontsize=8)
    plot.set_xticks(range(len(columns)), columns, fontsize=8)
    plot.set_yticks(range(len(rows)), rows, fontsize=8)
    plot.set_title(title, fontsize=10)
    figure.colorbar(image, label="change of p(right)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
