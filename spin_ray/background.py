"""Work beside the driver's main thread, and how an error in any thread ends all waits."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
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


WATCH_S = 0.5


def end_with(parent: int, over: threading.Event) -> None:
    """End this process, whatever it is blocked in, when its parent has ended before `over` is set."""
    while not over.wait(WATCH_S):
        if os.getppid() != parent:
            os._exit(1)


class Threads:
    """The threads of one run beside its main one. The first error in any of them ends every wait, here and where it is told."""

    def __init__(self, *tell: Callable[[BaseException], None]):
        """`tell`: what else must hear of the first error."""
        self._tell, self._started = tell, []
        self._failed: Future = Future()
        self._failing = threading.Lock()

    def start(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call the function in a thread; its error is everybody's."""

        def guarded() -> Any:
            try:
                return function(*args)
            except BaseException as error:
                self.fail(error)
                raise

        self._started.append(in_background(guarded))
        return self._started[-1]

    def fail(self, error: BaseException) -> None:
        """End every wait with this error; only the first one counts."""
        with self._failing:
            if self._failed.done():
                return
            self._failed.set_exception(error)
        for tell in self._tell:
            tell(error)

    def original(self, error: BaseException) -> BaseException:
        """The first error, if this one is only its copy that came back from another process, without its traceback."""
        first = self._failed.exception() if self._failed.done() else None
        return first if first and (type(first), str(first)) == (type(error), str(error)) else error

    def result(self, future: Future) -> Any:
        """The result of a future, of a remote answer too; raises the first error of any thread as soon as there is one."""
        wait([future, self._failed], return_when=FIRST_COMPLETED)
        return self._failed.result() if self._failed.done() else future.result()

    def settled(self, future: Future, *, timeout_s: float) -> bool:
        """Whether `result` has an answer, after so many seconds at most."""
        return bool(wait([future, self._failed], timeout=timeout_s, return_when=FIRST_COMPLETED).done)

    def finish(self) -> None:
        """Wait for all that was started."""
        for future in self._started:
            self.result(future)


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
