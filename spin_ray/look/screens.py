"""How answers appear while they are written: as a stream, side by side, or in a pipe as plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

NARROWEST = 30
"""Columns of an answer; where there are fewer, answers stand one under the other."""

Hear = Callable[[int, str], None]
"""Gets the place of a model, and what is new of its answer, which is printable."""


class Screen(Protocol):
    def answering(self) -> AbstractContextManager[Hear]:
        """While the body runs, one line of the user is answered by all."""


class Lines:
    """Plain text, one model after the other; with several, each answer has its model's name before it."""

    def __init__(self, talkers: Sequence[Any]):
        self._names = [talker.name for talker in talkers]

    @contextmanager
    def answering(self) -> Iterator[Hear]:
        last = None

        def hear(place: int, new: str) -> None:
            nonlocal last
            if place != last:
                before = "" if last is None else "\n"
                name = f"{self._names[place]}: " if len(self._names) > 1 else ""
                print(f"{before}{name}", end="")
                last = place
            print(new, end="", flush=True)

        try:
            yield hear
        finally:
            print(flush=True)


class Beside:
    """Two answers side by side, or one under the other where the terminal is narrow."""

    def __init__(self, talkers: Sequence[Any], console: Console | None = None):
        self._names = [talker.name for talker in talkers]
        self._console = console or Console(file=sys.stdout, highlight=False, emoji=False)

    @contextmanager
    def answering(self) -> Iterator[Hear]:
        texts = ["" for _ in self._names]
        with Live(console=self._console, auto_refresh=True, transient=True, vertical_overflow="crop") as live:

            def hear(place: int, new: str) -> None:
                texts[place] += new
                live.update(self._drawn(self._tails(texts)))

            yield hear
        self._console.print(self._drawn(texts))

    def _tails(self, texts: Sequence[str]) -> list[str]:
        """What of growing answers fits onto the screen: their ends."""
        room = max(3, self._console.height - 4) // (1 if self._is_wide else len(texts))
        width = self._console.width // (len(texts) if self._is_wide else 1) - 3
        return ["\n".join(line.plain for line in Text(text).wrap(self._console, max(1, width))[-room:]) for text in texts]

    @property
    def _is_wide(self) -> bool:
        return self._console.width >= len(self._names) * (NARROWEST + 2)

    def _drawn(self, texts: Sequence[str]) -> RenderableType:
        """Text objects: what looks like rich's markup in an answer is text."""
        if not self._is_wide:
            parts = [part for name, text in zip(self._names, texts, strict=True) for part in (Text(name, style="bold"), Text(text))]
            return Group(*parts)
        table = Table(expand=True, show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
        for name in self._names:
            table.add_column(Text(name, style="bold"), ratio=1, overflow="fold")
        table.add_row(*map(Text, texts))
        return table
