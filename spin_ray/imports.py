"""Starting without the garbage collector, which walks through all that is imported again and again (docs/log.md has the seconds)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """While the body runs, collect nothing; then leave all that is alive out of later collections: a start's objects stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
