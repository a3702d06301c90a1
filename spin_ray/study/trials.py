"""A run as a process of its own, watched through what it marks in its directory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from spin_ray.config import load_config
from spin_ray.errors import BadInput, RunStopped
from spin_ray.exits import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from spin_ray.heldout import has_collapsed
from spin_ray.interrupt import Interrupted
from spin_ray.manifest import RunDir

POLL_S = 1.0

_RUNNING: set[subprocess.Popen] = set()
"""Runs of this process."""
_OVER = Event()
"""Set at the first failure or signal: no run begins any more."""


@dataclass(frozen=True)
class Outcome:
    """How a run has ended."""

    code: int
    """Exit code of `spin-ray run`."""
    line: str
    """What it said last on standard error."""
    evaluations: dict[int, dict[str, float]]
    """Version -> held-out metrics."""
    seconds: float


def play(
    config: str, overrides: Sequence[str], log: Path, heard: Callable[[int, dict[str, float], RunDir], None] = lambda *_: None,
    command: str = "run",
) -> Outcome:
    """Run the config, or go on with it, or carry out another command for it.

    `heard` is told of every version's held-out metrics as soon as they are marked.
    The run has our environment, so runs share the cluster in RAY_ADDRESS, if there is one. Its own output goes to `log`. A signal to
    us reaches it too (`side_by_side`): it saves its progress and ends.
    """
    run = RunDir(load_config(config, overrides)[0].run_path)
    log.parent.mkdir(parents=True, exist_ok=True)
    begun, told = time.monotonic(), set()
    with log.open("a") as output:
        words = [sys.executable, "-m", "spin_ray", command, config, *overrides]
        with _running(words, stdout=output, stderr=subprocess.STDOUT) as process:
            ended = False
            while not ended:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=POLL_S)
                    ended = True
                for version, metrics in run.evaluations().items():
                    if version not in told:
                        told.add(version)
                        heard(version, metrics, run)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("spin-ray: ")]
    return Outcome(process.returncode, lines[-1].removeprefix("spin-ray: ") if lines else "", run.evaluations(), time.monotonic() - begun)


def refuse_unfinished(name: str, outcome: Outcome, run: RunDir, log: Path) -> None:
    """Raise what keeps a run from counting: it was interrupted, refused, or failed otherwise than by bad numbers."""
    if outcome.code == EXIT_INTERRUPTED:
        raise Interrupted("interrupted; the same command goes on")
    if outcome.code == EXIT_BAD_INPUT:
        raise BadInput(f"{name}: {outcome.line}")
    if outcome.code and not run.marks("diverged"):
        raise RunStopped(f"{name}: {outcome.line}; see {log}; the same command goes on")


@contextmanager
def _running(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that an error in the body ends too. Raises Interrupted where nothing may begin any more."""
    refuse_to_begin()
    process = subprocess.Popen(words, **options)
    _RUNNING.add(process)
    try:
        if _OVER.is_set():  # the signal came before anybody knew of this process
            process.terminate()
        yield process
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        _RUNNING.discard(process)


def refuse_to_begin() -> None:
    """Raise Interrupted if something has failed, or a signal has come."""
    if _OVER.is_set():
        raise Interrupted("interrupted; the same command goes on")


def side_by_side(work: Callable[[Any], object], items: Iterable[Any], concurrent: int) -> None:
    """Do the work for every item, so many at a time.

    After the first failure, or a signal, nothing more begins: no item, and no run of an item that is under way. What runs is waited for.
    """
    failures: list[BaseException] = []

    def one(item: Any) -> None:
        if _OVER.is_set():
            return
        try:
            work(item)
        except BaseException as error:
            failures.append(error)
            _OVER.set()

    with _sigterm_passed_on(), ThreadPoolExecutor(concurrent) as pool:
        try:
            for _ in pool.map(one, items):
                pass
        except BaseException:
            _OVER.set()
            raise
    if failures:
        raise failures[0]


@contextmanager
def _sigterm_passed_on() -> Iterator[None]:
    """A terminal's Ctrl-C goes to our runs as to us; a SIGTERM comes to us alone."""

    def pass_on(*_: Any) -> None:
        _OVER.set()
        for process in list(_RUNNING):
            process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _OVER.clear()


def collapsed(run: RunDir) -> bool:
    """Whether the run's numbers went bad, or its last version is far worse than its first."""
    return bool(run.marks("diverged")) or has_collapsed(run.evaluations())
