"""Work beside the driver's main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
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
