"""Work beside the driver's main thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any


def in_background(function: Callable[..., Any], *args: Any) -> Future:
    """Call the function in a daemon thread: one that still waits for a remote answer never keeps the process alive."""
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # raised again where the Future is asked
            future.set_exception(error)

    threading.Thread(target=call, name=getattr(function, "__name__", "background"), daemon=True).start()
    return future


@contextmanager
def every(seconds: float, function: Callable[[], None]) -> Iterator[None]:
    """While the body runs, call the function every so many seconds, and once at the end. What it raises is only logged."""
    ended = threading.Event()

    def repeat() -> None:
        over = False
        while not over:
            over = ended.wait(seconds)
            try:
                function()
            except Exception as error:
                logging.getLogger(__name__).warning("%s: %s", type(error).__name__, error)

    repeating = in_background(repeat)
    try:
        yield
    finally:
        ended.set()
        repeating.result()
