"""What a run's folder says: its config, what it has marked, measured and kept. Nothing is written; a run may be going on meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spin_ray.config import Config, flatten
from spin_ray.config.values import flatten_dict
from spin_ray.errors import BadInput
from spin_ray.look.stored import Stored, open_stored
from spin_ray.manifest import RunDir
from spin_ray.records import Span
from spin_ray.timeline import laid_out

WHERE = ("run.dir", "run.name", "run.scratch", "tracking.")
"""Keys that say where a run lies, not what it is."""


@dataclass(frozen=True)
class Story:
    """A run, as its folder tells it."""

    stored: Stored

    @property
    def run(self) -> RunDir:
        """Its paths, and its storage."""
        return self.stored.run

    def marks(self, *stages: str) -> list[dict[str, Any]]:
        return self.stored.marks(*stages)

    @property
    def name(self) -> str:
        return self.run.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Dotted key -> value."""
        return flatten_dict(self.stored.saved_config or {})

    @cached_property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (default, value), of all that differ."""
        defaults = flatten(Config())
        return {key: (defaults.get(key), value) for key, value in self.config.items() if defaults.get(key) != value}

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, oldest first."""
        return self.stored.metrics

    @cached_property
    def laid_out(self) -> tuple[list[Span], list[float]]:
        """Spans of all sessions, in seconds since the first one, one session behind the other; where sessions meet."""
        return laid_out(self.stored.read("timeline.jsonl"))

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        return dict(sorted((mark["version"], mark["metrics"]) for mark in self.marks("evaluation")))

    @cached_property
    def tasks(self) -> dict[int, dict[str, dict[str, float]]]:
        """Version -> benchmark or group of them -> its metrics, as the version was asked last."""
        found = {mark["version"]: {head: mark["tasks"][head] for head in mark["heads"]} for mark in self.marks("tasks")}
        return dict(sorted(found.items()))

    @cached_property
    def iterations(self) -> list[dict[str, Any]]:
        """Marks of those that have ended."""
        return self.marks("iteration")

    @cached_property
    def session(self) -> dict[str, Any]:
        """The latest one's mark; empty for a run of a version that did not keep it."""
        return (self.marks("session") or [{}])[-1]

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
    def is_finished(self) -> bool:
        return (self.marks("finished", "extended") or [{"stage": ""}])[-1]["stage"] == "finished"

    @property
    def best(self) -> str:
        """The model that its held-out numbers name; "" where there are none."""
        return self.stored.read("best").decode().strip()

    @property
    def state(self) -> str:
        """How it stands, in a few words; whether it is going on at the moment is not said here."""
        done = f"{len(self.iterations)} of {self.num_iterations} iterations"
        last = (self.marks("stopped", "diverged", "extended", "iteration") or [{"stage": ""}])[-1]
        if last["stage"] == "diverged":
            return f"diverged after {done}: {last['reason']}"
        if self.is_finished:
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
        found = [Story(Stored(RunDir(path.resolve()))) for path in sorted(trials.iterdir()) if (path / "config.json").exists()]
        if not found:
            raise BadInput(f"{where}: a search none of whose trials has begun")
        return found
    story = Story(open_stored(where))
    if story.stored.saved_config is None:
        raise BadInput(f"{where}: no run there (no config.json); give the folder or the URL of one, such as runs/demo")
    return [story]


def differing(stories: Sequence[Story]) -> dict[str, list[Any]]:
    """Dotted key -> its value in every run, of those that are not the same in all; where they lie does not count."""
    keys = dict.fromkeys(key for story in stories for key in story.config)
    found = {key: [story.config.get(key) for story in stories] for key in keys if not key.startswith(WHERE)}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
