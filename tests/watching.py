"""Looking at a run from outside while it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path


def records(run: Path, file: str) -> list[dict]:
    """All whole lines: the run may be writing the last one."""
    path = run / file
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(run: Path, iteration: int) -> list[int]:
    return [r["step"] for r in records(run, "metrics.jsonl") if "train/loss" in r and r["iteration"] == iteration]


def wait_for(condition: Callable[[], object], what: str, timeout: float = 900) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, f"waited {timeout} s for {what}"
        time.sleep(0.02)
