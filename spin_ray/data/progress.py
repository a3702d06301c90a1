"""How far a long reading has got, and how long it will go on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUIET_S = 2.0
"""Nothing is shown before."""
EVERY_S = 0.5
SAMPLE = 200
"""Lines whose lengths tell how many lines a file has."""


class Progress:
    """Shows "reading SOURCE: N of about M rows, about 3 min left" after two seconds, each line in place of the one before."""

    def __init__(self, source: str, show: Callable[[str], None] | None) -> None:
        self._source, self._show = source, show
        self._begun = time.monotonic()
        self._next, self._shown = self._begun + QUIET_S, False
        self._total: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._show and self._shown:
            self._show("")

    def at(self, num_rows: int) -> None:
        now = time.monotonic()
        if self._show and now >= self._next:
            self._total = self._total if self._shown else about_how_many(self._source)
            self._next, self._shown = now + EVERY_S, True
            total = f" of about {self._total:,}" if self._total else ""
            left = time_left(num_rows, self._total or 0, now - self._begun)
            self._show(f"reading {self._source}: {num_rows:,}{total} rows{left}")


def about_how_many(source: str) -> int | None:
    """Rows of a plain file, by its size and its first lines, or by what a table says of itself; None where that would take reading it."""
    path = Path(source)
    if not path.is_file():
        return None
    if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv"):
        with path.open("rb") as file:
            sizes = [len(line) for line in itertools.islice(file, SAMPLE)]
        return round(path.stat().st_size * len(sizes) / sum(sizes)) if sizes else None
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    return None


def time_left(done: int, total: int, elapsed_s: float) -> str:
    """", about 3 min left" for the user; "" where it cannot be said yet. time_left(50, 100, 60.0) -> ", about 60 s left"."""
    if done <= 0 or elapsed_s < 1 or total <= done:
        return ""
    return f", about {duration(elapsed_s * (total - done) / done)} left"


def duration(seconds: float) -> str:
    """As people say it. duration(5400.0) -> "90 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
