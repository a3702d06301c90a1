"""Libraries' noise goes to a temporary file, which is kept only if something fails."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from spin_ray.chatter import captured_output


@contextmanager
def quietly(what: str) -> Iterator[tuple[TextIO, Path]]:
    """While the body runs, nothing but what goes to the stream that this yields reaches the user; also yields the file of the rest.

    The file is removed at the end if the body does not fail, unless the body has renamed it.
    """
    number, name = tempfile.mkstemp(prefix=f"spin-ray-{what}-", suffix=".log")
    os.close(number)
    with captured_output(name) as to_user:
        yield to_user, Path(name)
    with suppress(FileNotFoundError):
        Path(name).unlink()
