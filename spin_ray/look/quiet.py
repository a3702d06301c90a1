"""Libraries' noise goes to a temporary file, which is kept only if something fails."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spin_ray.chatter import captured_output


@contextmanager
def quietly(what: str) -> Iterator[None]:
    """While the body runs, nothing that is printed reaches the user. The file is removed at the end if the body does not fail."""
    number, name = tempfile.mkstemp(prefix=f"spin-ray-{what}-", suffix=".log")
    os.close(number)
    with captured_output(name):
        yield
    with suppress(FileNotFoundError):
        Path(name).unlink()
