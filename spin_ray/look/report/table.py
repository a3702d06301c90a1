"""The held-out numbers of a run's versions as a plain table."""

from __future__ import annotations

from spin_ray.look.report.figures import shown
from spin_ray.look.report.story import Story
from spin_ray.look.stored import Stored
from spin_ray.manifest import RunDir


def held_out_table(run: RunDir) -> str:
    """A line per version, a column per metric with its standard error; a word where nothing has been measured."""
    story = Story(Stored(run))
    names = list(dict.fromkeys(name for metrics in story.evaluations.values() for name in metrics))
    if not names:
        return "Nothing has been measured on held-out data.\n"
    rows = [["version", *names]]
    rows += [[story.version_name(v), *(shown(m[name]) if name in m else "-" for name in names)] for v, m in story.evaluations.items()]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + "\n" for row in rows)
