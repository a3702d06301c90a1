"""Pictures of many runs. The drawing library is loaded when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_ray.study.search import Range, Search


def draw_search(results: Sequence[dict[str, Any]], search: Search, metric: str, path: Path) -> None:
    """The metric over the first two ranges of a search, collapsed and pruned trials marked."""
    axes = [key for key, values in search.space.items() if isinstance(values, Range)][:2] or list(search.space)[:1]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, plot = plt.subplots(figsize=(7, 5), layout="constrained")
    marks = {"finished": "o", "pruned": "s", "collapsed": "X"}
    known = [result["value"] for result in results if result["value"] is not None]
    limits = (min(known), max(known)) if known else (0, 1)
    drawn = None
    for state, mark in marks.items():
        those = [result for result in results if result["state"] == state and result["value"] is not None]
        xs = [result["params"][axes[0]] for result in those]
        ys = [result["params"][axes[1]] if len(axes) > 1 else result["value"] for result in those]
        colors = [result["value"] for result in those]
        if those:
            drawn = plot.scatter(
                xs, ys, c=colors, marker=mark, s=110, vmin=limits[0], vmax=limits[1], cmap="viridis", label=state,
                edgecolors="crimson" if state == "collapsed" else "black", linewidths=1.5 if state == "collapsed" else 0.6,
            )
    for key, scale in zip(axes, (plot.set_xscale, plot.set_yscale), strict=False):
        values = search.space[key]
        if isinstance(values, Range) and values.log:
            scale("log")
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1] if len(axes) > 1 else metric)
    if drawn is not None:
        figure.colorbar(drawn, label=metric)
        plot.legend(title="trial")
    figure.savefig(path, dpi=110)
    plt.close(figure)
