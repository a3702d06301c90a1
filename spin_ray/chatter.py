"""Where the noise of the libraries goes: into files under the run's logs/, not onto the user's terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from spin_ray.errors import BadInput
from spin_ray.exits import flush_output, log_traceback
from spin_ray.interrupt import Interrupted


def redirect_output(path: str | Path) -> None:
    """Send this process's standard output and error, also those of its C libraries and children, to the end of a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.stderr.reconfigure(line_buffering=True)


@contextmanager
def captured_output(path: str | Path) -> Iterator[TextIO]:
    """While the body runs, send all that this process and its libraries print, and Python's logging, to a file.

    Yields the standard output from before, for the one who may speak to the user. The file gets the traceback of what the body
    raises, unless that is the user's to mend.
    """
    saved = [os.dup(1), os.dup(2)]
    try:
        with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as to_user:
            redirect_output(path)
            _log_to_stderr_only()
            try:
                yield to_user
            except BaseException as error:
                if not isinstance(error, (BadInput, Interrupted, KeyboardInterrupt)):
                    log_traceback(error, path)
                raise
    finally:
        flush_output()
        for number, original in enumerate(saved, start=1):
            os.dup2(original, number)
            os.close(original)


def _log_to_stderr_only() -> None:
    """One handler for every logger: libraries' own ones may hold on to other streams."""
    for logger in (logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)):
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.propagate = True
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.root.handlers[0].setLevel(logging.INFO)  # Ray Data's own loggers are at DEBUG
    logging.captureWarnings(True)
