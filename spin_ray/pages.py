"""What a run writes for people into its folder, anew whenever a version stands: report.html, table.txt, the cards of its models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from spin_ray.card import write_cards
from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.errors import in_one_line
from spin_ray.exits import log_traceback
from spin_ray.look.report.samples import Samples, samples_of
from spin_ray.look.report.story import Story
from spin_ray.look.report.table import held_out_table
from spin_ray.look.report.verdict import better
from spin_ray.look.report.write import NAME, write_own
from spin_ray.look.stored import Stored
from spin_ray.theta import Thetas
from spin_ray.tokenizer import as_text

ANSWERS = 64
"""Prompts of the table of answers."""


class Pages:
    """Thread-safe. They show what there is: what goes wrong with one is said, and does not end the run."""

    def __init__(self, config: Config, thetas: Thetas, chat: ChatFormat, say: Callable[[str], None]):
        self._config, self._thetas, self._run, self._chat, self._say = config, thetas, thetas.run, chat, say
        self._writing = threading.Lock()

    @property
    def report(self) -> Path:
        return self._run.path / NAME

    def stands(self, version: int) -> None:
        """theta_version is made, and evaluated if it is to be."""
        if version:
            self._try("the model card", lambda: write_cards(self._config, self._run, self._thetas, version))
        self.write()

    def answers(self) -> tuple[list[str], list[list[str]]]:
        """What all versions so far have answered to the same prompts: columns and rows of a table, none where that cannot be read."""
        found = Samples("", [], [])

        def read() -> None:
            nonlocal found
            found = samples_of(Story(Stored(self._run)), as_text(self._chat.tokenizer), ANSWERS)

        self._try("the table of answers", read)
        text = lambda pieces: "".join(piece[0] for piece in pieces)  # noqa: E731
        rows = [[row["prompt"], text(row["real"]), *map(text, row["answers"])] for row in found.rows]
        return ["prompt", "real", *found.versions], rows

    def conclude(self) -> None:
        """Say whether a run that is finished has made its model better, and where to read on."""
        if self._run.finished:
            name = self._run.storage.name(self.report)
            self._try("the verdict", lambda: self._say(f"{better(Story(Stored(self._run)))} Report: {name}"))

    def model(self, version: int) -> tuple[str, Path | None]:
        """Where theta_version lies: for people, and on this disk, if it does."""
        folder = self._thetas.folders(version - 1)[0] if version else None
        return self._thetas.name(version), folder if folder and folder.is_dir() else None

    def write(self) -> None:
        """The report and the table, of all that there is."""
        self._try(NAME, lambda: write_own(self._run, as_text(self._chat.tokenizer)))
        self._try("table.txt", self._write_table)

    def _write_table(self) -> None:
        with self._run.storage.written(self._run.path / "table.txt") as temporary:
            temporary.write_text(held_out_table(self._run), encoding="utf-8")

    def _try(self, what: str, write: Callable[[], None]) -> None:
        with self._writing:
            try:
                write()
            except Exception as error:
                log = self._run.logs / "driver.log"
                log_traceback(error, log)
                self._say(f"{what} could not be written ({in_one_line(error)}); the run goes on, see {log}")
