"""Folders of many runs, for `spin-ray show`: a search's, and a study's lines and runs. One table with a row per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from spin_ray.lock import seen_at_work
from spin_ray.look.state import RUNNING, Facts, facts_of
from spin_ray.look.stored import Stored
from spin_ray.manifest import RunDir
from spin_ray.storage import DISK

NOT_RUNNING = "not running"


@dataclass(frozen=True)
class Trials:
    folder: str
    what: str
    state: str
    """running or not running."""
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def trials_of(folder: Path) -> Trials | None:
    """None for a folder that is not one of many runs."""
    kinds: tuple[tuple[Callable[[Path], bool], Callable[[Path], Trials]], ...] = (
        (lambda path: (path / "search.json").exists(), _search),
        (lambda path: (path / "runs.jsonl").exists(), _lines),
        (lambda path: (path / "runs").is_dir() and (path / "data").is_dir(), _study),
    )
    return next((read(folder) for fits, read in kinds if fits(folder)), None)


def _search(folder: Path) -> Trials:
    from spin_ray.study.seen import trials_in  # not at the top: it loads optuna

    found = trials_in(folder)
    keys = list(dict.fromkeys(key for trial in found for key in trial.params))
    rows = []
    for trial in found:
        facts = _facts(folder / "trials" / f"trial_{trial.number:03d}")
        state = trial.state if trial.state != "begun" or facts is None else facts.state
        minutes = "–" if trial.minutes is None else f"{trial.minutes:.1f}"
        rows.append([f"{trial.number}", *(_short(trial.params.get(key)) for key in keys), state, *_numbers(facts), minutes])
    notes = [f"the best config: {folder}/best.yaml"] if (folder / "best.yaml").exists() else []
    return Trials(str(folder), "a search", _at_work(folder), ["trial", *keys, "state", *_NUMBERS, "minutes"], rows, notes)


def _study(folder: Path) -> Trials:
    """Where the runs of a study lie that have no line yet."""
    rows = []
    for path in sorted((folder / "runs").iterdir()):
        if facts := _facts(path):
            rows.append([path.name, facts.state, *_numbers(facts)])
    return Trials(str(folder), "a study's unfinished runs", _at_work(folder), ["run", "state", *_NUMBERS], rows)


def _lines(folder: Path) -> Trials:
    """A study's finished runs."""
    from spin_ray.study.lines import Lines

    rows = [
        [line.arm, line.stage, " ".join(line.settings) or "–", str(line.seed), line.state, f"{line.minutes:.1f}"]
        for line in Lines(folder / "runs.jsonl")
    ]
    return Trials(str(folder), "a study's finished runs", NOT_RUNNING, ["arm", "stage", "settings", "seed", "state", "minutes"], rows)


_NUMBERS = ("iterations", "NLL/token", "match T=1")


def _numbers(facts: Facts | None) -> list[str]:
    """Of a run: iterations, and the held-out numbers of the last version that was evaluated."""
    if facts is None:
        return ["–"] * len(_NUMBERS)
    evaluated = [metrics for metrics in facts.versions.values() if "real_nll_nats_per_token" in metrics]
    last = evaluated[-1] if evaluated else {}
    numbers = (last.get("real_nll_nats_per_token"), last.get("exact_match_t1_share"))
    return [f"{facts.progress.iterations}/{facts.progress.num_iterations}", *("–" if n is None else f"{n:.4f}" for n in numbers)]


def _facts(path: Path) -> Facts | None:
    return facts_of(Stored(RunDir(path))) if (path / "config.json").exists() else None


def _at_work(folder: Path) -> str:
    return RUNNING if seen_at_work(DISK, folder / "lock")[1] else NOT_RUNNING


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "–" if value is None else str(value)
