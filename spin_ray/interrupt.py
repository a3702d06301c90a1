"""Ctrl-C and SIGTERM: once to end in good order, twice to end at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spin_ray.errors import RunStopped


class Interrupted(RunStopped):
    """The user, or the cluster, asked the run to end; the same command goes on. Exit code 130."""


class Interrupts:
    """Signals of this process, from `listen` on. Outside of `graceful`, and the second time, one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._graceful = False

    def listen(self) -> None:
        """At a command's start, and again after `ray.init`, which installs handlers of its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    @contextmanager
    def graceful(self) -> Iterator[Interrupts]:
        """While the body runs, the first signal only sets `requested`."""
        before, self._graceful = self._graceful, True
        try:
            yield self
        finally:
            self._graceful = before

    def _note(self, *_: Any) -> None:
        if self.requested or not self._graceful:
            raise KeyboardInterrupt
        self.requested = True
