"""What the harness says of a version, in names for people: `acc_norm` and its standard error `acc_norm_se`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TaskNumbers:
    """One version's."""

    tasks: Mapping[str, Mapping[str, float]]
    """Task or group -> its metrics, with their standard errors where the harness has them."""
    heads: tuple[str, ...]
    """Groups, and tasks that are in no group: what a user looks at first."""
    num_truncated: int
    """Requests that lost their begin because they were too long."""
    num_windowed: int
    """Texts that were read in windows because they were too long."""
    max_length: int
    """Tokens that the model could read."""
    num_fewshot: Mapping[str, int]
    """Task -> examples before each question."""
    versions: Mapping[str, Any]
    """Task or group -> its version: numbers of different ones are not to be compared."""
    harness: str
    """The version of lm-evaluation-harness."""

    def metrics(self) -> dict[str, float]:
        """For a tracker: `arc_challenge_acc_norm`, and of groups their own numbers alone."""
        flat = {f"{task}_{name}": value for task in self.heads for name, value in self.tasks[task].items()}
        return {**flat, "num_truncated": self.num_truncated, "num_windowed": self.num_windowed}

    def line(self) -> str:
        """For the terminal."""
        heads = (f"{task} {_first(self.tasks[task])}" for task in self.heads)
        return ", ".join(heads) + (f"; {self.num_truncated} requests were cut" if self.num_truncated else "")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _first(metrics: Mapping[str, float]) -> str:
    """Every metric of a task with its error."""
    return " ".join(
        f"{name} {value:.3f}" + (f" ± {metrics[f'{name}_se']:.3f}" if f"{name}_se" in metrics else "")
        for name, value in metrics.items() if not name.endswith("_se") and name != "num_docs"
    )


def in_words(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The harness' `results`: task -> "acc_norm,none" and "acc_norm_stderr,none" -> number. Filters become a part of the name."""
    return {task: {**_named(numbers), **_count(numbers)} for task, numbers in results.items()}


def _named(numbers: Mapping[str, Any]) -> dict[str, float]:
    named = {}
    for key, value in numbers.items():
        metric, comma, kind = key.partition(",")
        if comma and not isinstance(value, str):  # the harness writes "N/A" for an error that it does not know
            error = metric.endswith("_stderr")
            words = [metric.removesuffix("_stderr"), *([] if kind == "none" else [kind.replace("-", "_")]), *(["se"] if error else [])]
            named["_".join(words)] = float(value)
    return named


def _count(numbers: Mapping[str, Any]) -> dict[str, int]:
    count = numbers.get("sample_len", numbers.get("sample_count"))
    return {"num_docs": count} if isinstance(count, int) else {}
