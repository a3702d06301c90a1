"""What the user sees: one live line per player, and a row of the table after every iteration.

| where | what |
|---|---|
| a terminal | the lines are redrawn in place, with what is being done besides |
| a log file | each is printed now and then; whatever happens, something is said every PLAIN_EVERY_S seconds |
| `--quiet` | only how it ends |
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from spin_ray.background import every

PLAIN_EVERY_S = 20
PLAYERS = ("opponent", "main player")
COLUMNS = (
    ("model", 10, "model"), ("exact_match_t1_share", 12, "match T=1"), ("exact_match_greedy_share", 14, "match greedy"),
    ("real_nll_nats_per_token", 10, "NLL/token"), ("advantage_accuracy", 16, "y told from y'"),
    ("same_as_real_share", 8, "y' == y"), ("truncated_share", 10, "truncated"),
    ("generated_tokens", 11, "tokens y'"), ("loss", 8, "loss"), ("NLL term", 10, "NLL term"), ("NLL", 8, "NLL"), ("margin", 8, "margin"),
    ("train_s", 9, "train s"), ("waited_s", 10, "waited s"),
)


class Terminal:
    """Thread-safe. Without `with` nothing is redrawn, and nothing said of itself."""

    def __init__(self, file: TextIO, kept: Path | None = None, *, quiet: bool = False) -> None:
        """`kept`: a file that gets every line that is said, with its time, for those who look at the run later."""
        self._kept, self._quiet = kept, quiet
        self._console = Console(file=file, highlight=False, emoji=False)
        columns = TextColumn("{task.description:<12}"), BarColumn(24), TextColumn("{task.fields[text]}", markup=False), TimeElapsedColumn()
        self._live = Progress(*columns, console=self._console, transient=True, disable=quiet or not self._console.is_terminal)
        self._doing = self._live.add_task("", total=None, text="", visible=False)
        self._tasks = {player: self._live.add_task(player, total=1, text="", visible=False) for player in PLAYERS}
        self._news: dict[str, tuple[str, float]] = {}
        """Player, or "" for the rest -> what was last heard of it, and when (monotonic seconds)."""
        self._said = time.monotonic()
        self._printed = dict.fromkeys(self._tasks, self._said)
        self._columns: list[tuple[str, int, str]] = []
        self._open = ExitStack()

    def __enter__(self) -> Terminal:
        self._live.start()
        if self._live.disable and not self._quiet:
            self._open.enter_context(every(1.0, self._say_something))
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()
        self._live.stop()

    def say(self, text: str) -> None:
        self._print(text)
        self.keep(text)

    def conclude(self, text: str) -> None:
        """How it ends: what even a quiet command says."""
        self._print(text, always=True)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Let what is said elsewhere stand in the file of what was said."""
        if self._kept:
            # A full disk is told by what must be written.
            with suppress(OSError), self._kept.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())}  {text}\n")

    def _print(self, text: str, *, always: bool = False) -> None:
        self._said = time.monotonic()
        if always or not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """What is being done besides what the players do; the next one takes its place, and an empty one removes it."""
        self._live.update(self._doing, text=text, visible=bool(text))
        if text:
            self._news[""] = text, time.monotonic()
        else:
            self._news.pop("", None)

    def progress(self, player: str, done: int, total: int, text: str) -> None:
        """Redraw the line of a player: "opponent" or "main player"."""
        now = time.monotonic()
        self._live.update(self._tasks[player], completed=done, total=total, text=text, visible=True)
        self._news[player] = text, now
        if self._live.disable and now - self._printed[player] >= PLAIN_EVERY_S:
            self._printed[player] = now
            self._print(f"{player:<12} {text}")

    def _say_something(self) -> None:
        """In a log file, where nothing has been said for a while: what was heard last, and how long ago."""
        now = time.monotonic()
        if now - self._said >= max(1, PLAIN_EVERY_S - 1):  # asked for every second
            found = [f"{who:<12} {text}" if who else text for who, (text, _) in self._news.items()]
            since = now - max((when for _, when in self._news.values()), default=now)
            self._print(f"{' | '.join(found) or 'at work'}{f'  ({since:.0f} s ago)' if since >= 5 else ''}")

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
