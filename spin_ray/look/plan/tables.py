"""Rows of cells as text, and seconds as people say them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table(rows: Sequence[Iterable[str]]) -> Iterator[str]:
    cells = [list(row) for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    for row in cells:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()


def duration(seconds: float) -> str:
    """Worked: 5400 -> 1.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
