"""What the user sees: one live line per player, and a row of the table after every iteration."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 20
COLUMNS = (
    ("model", 10, "model"), ("exact_match_t1_share", 12, "match T=1"), ("exact_match_greedy_share", 14, "match greedy"),
    ("real_nll_nats_per_token", 10, "NLL/token"), ("advantage_accuracy", 16, "y told from y'"),
    ("same_as_real_share", 8, "y' == y"), ("truncated_share", 10, "truncated"),
    ("generated_tokens", 11, "tokens y'"), ("loss", 8, "loss"), ("NLL term", 10, "NLL term"), ("NLL", 8, "NLL"), ("margin", 8, "margin"),
    ("train_s", 9, "train s"), ("waited_s", 10, "waited s"),
)


class Terminal:
    """On a terminal the players' lines are redrawn in place; in a log file each is printed now and then."""

    def __init__(self, file: TextIO, kept: Path | None = None) -> None:
        """`kept`: a file that gets every line that is said, with its time, for those who look at the run later."""
        self._kept = kept
        self._console = Console(file=file, highlight=False, emoji=False)
        columns = TextColumn("{task.description:<12}"), BarColumn(24), TextColumn("{task.fields[text]}"), TimeElapsedColumn()
        self._live = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._tasks = {player: self._live.add_task(player, total=1, text="starting") for player in ("opponent", "main player")}
        self._printed = dict.fromkeys(self._tasks, time.monotonic())
        self._status_printed = -PLAIN_EVERY_S
        self._columns: list[tuple[str, int, str]] = []

    def __enter__(self) -> Terminal:
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._print(text)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Let what is said elsewhere stand in the file of what was said."""
        if self._kept:
            # A full disk is told by what must be written.
            with suppress(OSError), self._kept.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())}  {text}\n")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """A line that the next one replaces, and an empty one removes; in a log file one is printed now and then."""
        if self._console.is_terminal:
            self._console.file.write(f"\r\x1b[2K{text[: self._console.width - 1]}")
            self._console.file.flush()
        elif text and time.monotonic() - self._status_printed >= PLAIN_EVERY_S:
            self._status_printed = time.monotonic()
            self._print(text)

    def progress(self, player: str, done: int, total: int, text: str) -> None:
        """Redraw the line of a player: "opponent" or "main player"."""
        self._live.update(self._tasks[player], completed=done, total=total, text=text)
        if self._live.disable and time.monotonic() - self._printed[player] >= PLAIN_EVERY_S:
            self._printed[player] = time.monotonic()
            self._print(f"{player:<12} {text}")

    def row(self, cells: Mapping[str, Any], others: Collection[str] = ()) -> None:
        """One line of the run's table: a model and, where it was trained here, its iteration. `others`: columns of later rows."""
        if not self._columns:
            self._columns = [column for column in COLUMNS if column[0] in cells or column[0] in others]
            self._print("".join(f"{title:>{width}}" for _, width, title in self._columns))
        self._print("".join(f"{cell(cells.get(key)):>{width}}" for key, width, _ in self._columns))


def cell(value: Any) -> str:
    """A number, or that there is none, as the table has it."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
