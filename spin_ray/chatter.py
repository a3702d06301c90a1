"""Where the noise of the libraries goes: into files under the run's logs/, not onto the user's terminal."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


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


def log_to_file(path: str | Path) -> None:
    """Send every record of Python's logging in this process to a file and to no other place."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for logger in (logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)):
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.propagate = True
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)
    logging.captureWarnings(True)
