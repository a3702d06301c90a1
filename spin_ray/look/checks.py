"""A check of `spin-ray doctor`, and how it is carried out so that it hides no other: its errors are findings, its time is limited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil

from spin_ray.background import in_background
from spin_ray.config import Config
from spin_ray.errors import BadInput, in_one_line

OK, WARNING, ERROR = "ok", "warning", "error"
APART = (sys.executable, "-m", "spin_ray.look.apart")


@dataclass(frozen=True)
class Found:
    """What a check has found; several make a check's answer."""

    state: str
    """ok, warning or error."""
    what: str
    remedy: str = ""
    """What to do; empty: the check's own remedy."""


@dataclass(frozen=True)
class Subject:
    """What is looked at."""

    config: Config
    """The user's, or the demo's."""
    given: bool
    """Whether it is the user's."""
    words: tuple[str, ...]
    """The file and the overrides that it comes from."""
    folder: Path
    """For logs, and for all that a check writes."""
    joins: bool
    """Whether RAY_ADDRESS names a cluster."""


class Check(NamedTuple):
    """One entry of the list in doctor.py."""

    name: str
    work: Callable[[Subject], Iterable[Found]]
    remedy: str
    """What to do where it finds something."""
    limit_s: float = 20.0
    apart: bool = False
    """It loads libraries or starts processes, so it has a process of its own."""


@dataclass(frozen=True)
class Line:
    """A finding, for the user."""

    check: str
    state: str
    what: str
    remedy: str
    seconds: float


def carried_out(check: Check, subject: Subject) -> list[Line]:
    """The check's findings, whatever happens in it."""
    begun, found = time.monotonic(), []
    try:
        (_apart if check.apart else _beside)(check, subject, found)
    except TimeoutError:
        found = [*found, Found(ERROR, f"no answer within {check.limit_s:g} s")]
    except BadInput as error:
        found.append(Found(ERROR, str(error)))
    except Exception as error:  # a check that fails is a finding; the next one must still be made
        found.append(Found(ERROR, f"{type(error).__name__}: {in_one_line(error)}"))
    seconds = time.monotonic() - begun
    return [Line(check.name, one.state, one.what, "" if one.state == OK else one.remedy or check.remedy, seconds) for one in found]


def _beside(check: Check, subject: Subject, found: list[Found]) -> None:
    """In a thread, which adds to `found`; one that hangs is left behind."""
    future = in_background(lambda: found.extend(check.work(subject)))
    if not wait([future], timeout=check.limit_s).done:
        raise TimeoutError
    future.result()


def _apart(check: Check, subject: Subject, found: list[Found]) -> None:
    """In a process of its own, which is ended with all that it started when its time is over."""
    answer, log = subject.folder / f"{check.name}.json", subject.folder / f"{check.name}.log"
    words = [*APART, check.name, str(answer), str(subject.folder), *subject.words]
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            process.wait(timeout=check.limit_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            _end(process.pid)
            process.wait()
    if not answer.exists():
        raise RuntimeError(f"its process ended with code {process.returncode} and said: {_last_line(log)}")
    found += [Found(**one) for one in json.loads(answer.read_text())]


def write_answer(path: Path, found: Iterable[Found]) -> None:
    """From the process apart, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(one) for one in found]))
    os.replace(temporary, path)


def _end(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "nothing"


def in_folder(config: Config, folder: Path) -> Config:
    """The config as one whose run's files go into the folder of the checks."""
    return replace(config, run=replace(config.run, name="doctor", dir=str(folder)))
