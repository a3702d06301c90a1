"""Rows of cells as text, and seconds as people say them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from spin_ray.data.progress import duration as said


def table(rows: Sequence[Iterable[str]]) -> Iterator[str]:
    cells = [list(row) for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    for row in cells:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()


def duration(seconds: float) -> str:
    """Of work that may take less than ten seconds. Worked: 9000 -> 2.5 h."""
    return f"{seconds:.1f} s" if seconds < 10 else said(seconds)
