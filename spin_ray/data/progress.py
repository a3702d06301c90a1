"""How far a long reading has got."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

QUIET_S = 2.0
"""Nothing is shown before."""
EVERY_S = 0.5


class Progress:
    """Shows "reading SOURCE: N rows" after two seconds, each line in place of the one before; short reads show nothing."""

    def __init__(self, source: str, show: Callable[[str], None] | None) -> None:
        self._source, self._show = source, show
        self._next, self._shown = time.monotonic() + QUIET_S, False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._show and self._shown:
            self._show("")

    def at(self, num_rows: int) -> None:
        if self._show and time.monotonic() >= self._next:
            self._next, self._shown = time.monotonic() + EVERY_S, True
            self._show(f"reading {self._source}: {num_rows:,} rows")
