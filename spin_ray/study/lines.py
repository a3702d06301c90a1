"""What a study has found so far: a JSON line per finished run, in one file that only grows.

An interrupted study goes on from it, on any machine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spin_ray.config import changes_result, flatten, load_config
from spin_ray.errors import BadInput
from spin_ray.manifest import append_line
from spin_ray.storage import DISK

SEARCH, FINAL = "search", "final"


@dataclass(frozen=True)
class Trial:
    """One run of an arm."""

    arm: str
    stage: str
    """search: it chooses the arm's rate, on prompts of its own; final: it counts."""
    settings: tuple[str, ...]
    """All that the run has beside the study's config and its seed."""
    seed: int


@dataclass(frozen=True)
class Line(Trial):
    """How a run ended."""

    state: str
    """finished or collapsed."""
    minutes: float
    """Since it was last begun."""
    versions: dict[int, dict[str, float]] = field(default_factory=dict)
    """Version -> held-out metrics."""
    trainings: tuple[dict[str, float], ...] = ()
    """What each training took: num_steps, num_pairs, num_tokens, wall_s."""

    tries: tuple[dict[str, Any], ...] = ()
    """Of a probe."""

    @property
    def trial(self) -> Trial:
        return Trial(self.arm, self.stage, self.settings, self.seed)

    def steps(self, version: int) -> int:
        """Optimizer steps behind a version."""
        return int(sum(training["num_steps"] for training in self.trainings[:version]))

    @property
    def last(self) -> int:
        """The last version that was evaluated."""
        return max(self.versions)

    def score(self, version: int) -> float:
        """More is better: the probability of the right answer, or what there is where none can be checked."""
        metrics = self.versions[version]
        return metrics.get("right_probability", -metrics["real_nll_nats_per_token"])


class Lines:
    """The file. `add` may be called from several threads; two studies must not write into one file."""

    def __init__(self, path: Path):
        self._path, self._adding = path, threading.Lock()
        self._lines = list(_read(path))

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines)

    def of(self, trial: Trial) -> Line | None:
        return next((line for line in self._lines if line.trial == trial), None)

    def of_arm(self, arm: str, stage: str = FINAL) -> list[Line]:
        return [line for line in self._lines if (line.arm, line.stage) == (arm, stage)]

    def add(self, line: Line) -> None:
        """Append a line, whole and on disk when this returns."""
        with self._adding:
            append_line(self._path, json.dumps(_rounded(asdict(line))) + "\n")
            self._lines.append(line)


def refuse_other_config(path: Path, file: str) -> None:
    """Keep what a config file comes to, beside the lines; raises BadInput if runs were made when it came to something else.

    `path`: of what is kept, JSON: config file -> key -> value, of the keys that change results. A key that is new since then had no effect.
    """
    kept = json.loads(path.read_text()) if path.exists() else {}
    now = {key: value for key, value in flatten(load_config(file)[0]).items() if changes_result(key)}
    before = kept.get(file, {})
    changed = [f"{key} was {before[key]} and is {value}" for key, value in now.items() if key in before and before[key] != value]
    if changed:
        raise BadInput(f"{file}: {'; '.join(changed)} since {path.parent}/runs.jsonl was begun; set that back, or give another --out")
    if before.keys() != now.keys():
        with DISK.written(path) as temporary:
            temporary.write_text(json.dumps({**kept, file: now}, indent=2) + "\n")


def _read(path: Path) -> Iterable[Line]:
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        if text.endswith(b"\n"):
            try:
                found = json.loads(text)
                versions = {int(version): metrics for version, metrics in found["versions"].items()}
                lists = {key: tuple(found.get(key, ())) for key in ("settings", "trainings", "tries")}
                yield Line(**{**found, "versions": versions, **lists})
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f"{path}:{number}: no line of a study ({error}); delete it and its run is made again") from error


def _rounded(value: Any) -> Any:
    """Floats to six digits: what lies behind is noise, and the file stays readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
