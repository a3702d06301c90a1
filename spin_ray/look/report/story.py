"""What a run's folder says: its config, what it has marked, measured and kept. Nothing is written; a run may be going on meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spin_ray.config import Config, flatten
from spin_ray.config.values import flatten_dict
from spin_ray.errors import BadInput
from spin_ray.manifest import RunDir
from spin_ray.records import Span
from spin_ray.storage import open_storage
from spin_ray.timeline import laid_out

WHERE = ("run.dir", "run.name", "run.scratch", "tracking.")
"""Keys that say where a run lies, not what it is."""


def run_at(where: str) -> RunDir:
    """The run in a folder, or at a URL. Raises BadInput where there is none."""
    folder, _, query = where.partition("?")
    parent, _, name = folder.rstrip("/").rpartition("/")
    if "://" in where:
        from dataclasses import replace

        config = Config()
        config = replace(config, run=replace(config.run, dir=f"{parent}{'?' * bool(query)}{query}", name=name))
        run = RunDir(config.run_path, open_storage(config))
        for file in ("config.json", "manifest.jsonl", "metrics.jsonl", "timeline.jsonl"):
            run.storage.fetch(run.path / file)
    else:
        run = RunDir(Path(folder).resolve())
    if not (run.path / "config.json").exists():
        raise BadInput(f"{where}: no run there (no config.json); give the folder of one, such as runs/demo")
    return run


@dataclass(frozen=True)
class Story:
    """A run, as its folder tells it."""

    run: RunDir

    @property
    def name(self) -> str:
        return self.run.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Dotted key -> value."""
        return flatten_dict(json.loads((self.run.path / "config.json").read_text()))

    @cached_property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (default, value), of all that differ."""
        defaults = flatten(Config())
        return {key: (defaults.get(key), value) for key, value in self.config.items() if defaults.get(key) != value}

    @property
    def method(self) -> str:
        return self.config["method"]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, oldest first."""
        return list(_lines(self.run.path / "metrics.jsonl"))

    @cached_property
    def laid_out(self) -> tuple[list[Span], list[float]]:
        """Spans of all sessions, in seconds since the first one, one session behind the other; where sessions meet."""
        return laid_out(self.run.path)

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        return dict(sorted(self.run.evaluations().items()))

    @cached_property
    def tasks(self) -> dict[int, dict[str, dict[str, float]]]:
        """Version -> benchmark or group of them -> its metrics, as the version was asked last."""
        found = {mark["version"]: {head: mark["tasks"][head] for head in mark["heads"]} for mark in self.run.marks("tasks")}
        return dict(sorted(found.items()))

    @cached_property
    def iterations(self) -> list[dict[str, Any]]:
        """Marks of those that have ended."""
        return self.run.marks("iteration")

    @cached_property
    def session(self) -> dict[str, Any]:
        """The latest one's mark; empty for a run of a version that did not keep it."""
        return (self.run.marks("session") or [{}])[-1]

    @property
    def num_iterations(self) -> int:
        return self.config["spin.num_iterations"] if self.method == "spin" else 1

    @property
    def first_name(self) -> str:
        """What theta_0 is called."""
        return "theta_0" if self.method == "sft" else "SFT"

    def version_name(self, version: int) -> str:
        return f"theta_{version}" if version else self.first_name

    @property
    def state(self) -> str:
        """How it stands, in a few words; whether it is going on at the moment is not said here."""
        done = f"{len(self.iterations)} of {self.num_iterations} iterations"
        last = (self.run.marks("stopped", "diverged", "extended", "iteration") or [{"stage": ""}])[-1]
        if last["stage"] == "diverged":
            return f"diverged after {done}: {last['reason']}"
        if self.run.finished:
            return f"finished early after {done}: {last['reason']}" if last["stage"] == "stopped" else "finished"
        return f"{done} so far"

    def steps(self, name: str) -> tuple[list[float], list[float]]:
        """(global steps, values) of a metric of training; a step that was taken again counts once, as it was last."""
        found = {line["train/global_step"]: line[f"train/{name}"] for line in self.metrics if f"train/{name}" in line}
        return list(found), list(found.values())

    def series(self, group: str, name: str, by: str) -> tuple[list[float], list[float]]:
        """(stamps, values) of any metric, the last one of each stamp."""
        found = {line[by]: line[f"{group}/{name}"] for line in self.metrics if f"{group}/{name}" in line and by in line}
        return list(found), list(found.values())


def stories_in(where: str) -> list[Story]:
    """The run there, or all runs of a search or a study. Raises BadInput where there is none."""
    trials = Path(where) / "trials"
    if trials.is_dir():
        found = [Story(RunDir(path.resolve())) for path in sorted(trials.iterdir()) if (path / "config.json").exists()]
        if not found:
            raise BadInput(f"{where}: a search none of whose trials has begun")
        return found
    return [Story(run_at(where))]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # one that is being written, or was cut short by a crash
            yield json.loads(line)


def differing(stories: Sequence[Story]) -> dict[str, list[Any]]:
    """Dotted key -> its value in every run, of those that are not the same in all; where they lie does not count."""
    keys = dict.fromkeys(key for story in stories for key in story.config)
    found = {key: [story.config.get(key) for story in stories] for key in keys if not key.startswith(WHERE)}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
