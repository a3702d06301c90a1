"""What the benches share: the machine in words, a run of the command line, the result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from spin_ray.errors import RunStopped
from spin_ray.records import Span
from spin_ray.timeline import read_spans


def machine() -> str:
    """For a result: what it was measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPU cores, {memory:.0f} GiB, {platform.machine()}"


def print_result(result: dict[str, Any]) -> None:
    """The bench's last line: one JSON object."""
    print(json.dumps({**result, "machine": machine()}), flush=True)


def processes() -> Iterator[tuple[str, psutil.Process]]:
    """This run's processes by what they are: "driver" (this one), and actors by their class."""
    own = psutil.Process()
    yield "driver", own
    for process in own.children(recursive=True):
        try:
            title = process.cmdline()[0]
        except (psutil.NoSuchProcess, IndexError):  # it ended while we looked
            continue
        if title.startswith("ray::"):
            yield title.removeprefix("ray::").split(".")[0].split("(")[0], process


def cpu_seconds() -> Counter[str]:
    """CPU seconds that this run's processes have taken so far, summed by what they are."""
    found: Counter[str] = Counter()
    for name, process in processes():
        with suppress(psutil.NoSuchProcess):  # it ended while we looked
            times = process.cpu_times()
            found[name] += times.user + times.system
    return found


QUIET_S = 4.0


def idle_shares() -> Counter[str]:
    """CPU seconds that each kind of process takes in a second, measured for some seconds in which nothing happens."""
    before, begun = cpu_seconds(), time.monotonic()
    time.sleep(QUIET_S)
    after, seconds = cpu_seconds(), time.monotonic() - begun
    return Counter({name: (after[name] - before[name]) / seconds for name in before})


class Meter:
    """CPU seconds of each kind of process since this was made, what they take when nothing happens left out."""

    def __init__(self, idle: Mapping[str, float] = {}):
        self._idle, self._before, self._begun = idle, cpu_seconds(), time.monotonic()

    def each(self, count: int) -> Counter[str]:
        """For one of so many events."""
        now, seconds = cpu_seconds(), time.monotonic() - self._begun
        return Counter({
            name: max(0.0, spent - self._before[name] - seconds * self._idle.get(name, 0.0)) / count for name, spent in now.items()
        })


def run_command(*arguments: str | Path, env: dict[str, str] | None = None) -> None:
    """Run `python ...` in a process of its own. Raises RunStopped with what it said last if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env={**os.environ, "WANDB_MODE": "offline", **(env or {})}, capture_output=True, text=True
    )
    if done.returncode:
        raise RunStopped(f"{' '.join(map(str, arguments))} failed with code {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")


def told_by_process(*arguments: str, timeout_s: float) -> Any:
    """What `spin-ray bench ARGUMENTS --one FILE`, in a process of its own, writes into the file as JSON.

    Where there is none, because it died or hangs, a string that says so: that is a result too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch, "result.json"), Path(scratch, "log")
        try:
            with log.open("w") as file:
                subprocess.run(
                    [sys.executable, "-m", "spin_ray", "bench", *arguments, "--one", str(result)], stdout=file, stderr=file,
                    timeout=timeout_s, check=False,
                )
        except subprocess.TimeoutExpired:
            return f"nothing within {timeout_s:g} s"
        return json.loads(result.read_text()) if result.exists() else _last_line(log.read_text())


def _last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "died")


def run_spin(config: str, run: Path, overrides: Sequence[str]) -> list[Span]:
    """A whole `spin-ray run` into the folder `run`; returns its timeline."""
    run_command("-m", "spin_ray", "run", config, f"run.dir={run.parent}", f"run.name={run.name}", *overrides)
    return read_spans(run)


def last_evaluation(run: Path) -> dict[str, float]:
    marks = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    return next((mark["metrics"] for mark in reversed(marks) if mark["stage"] == "evaluation"), {})
