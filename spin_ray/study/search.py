"""What a search tries: a YAML file that names keys of the config, and for each a list of choices or a range.

    trials: 12
    space:
      spin.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
      spin.loss: [logistic, space]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from spin_ray.config import load_config, read_yaml
from spin_ray.errors import BadInput

METRICS = ("auto", "exact_match_t1_share", "exact_match_greedy_share", "real_nll_nats_per_token")
LOWER_IS_BETTER = ("real_nll_nats_per_token",)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; whole ones where both are."""

    low: float
    high: float
    log: bool = False
    """Whether factors count, not differences."""


@dataclass(frozen=True)
class Search:
    space: dict[str, Range | list[Any]]
    """Key of the config -> what it may be."""
    trials: int = 12
    metric: str = "auto"
    """Held-out metric; auto: exact match at temperature 1 where answers can be checked, else the NLL."""
    concurrent: int = 1
    """Runs at a time."""
    seed: int = 0
    prune: bool = True
    """End a run at an iteration's border where its metric is below the median of the others there."""
    fixed: list[dict[str, Any]] = field(default_factory=list)
    """Values that are tried first, one dictionary each."""


def read_search(path: str, config: str, overrides: Sequence[str]) -> Search:
    """Read a search, and check that a run could be started with either end of every range. Raises BadInput."""
    given = read_yaml(path)
    known = [entry.name for entry in fields(Search)]
    if unknown := [key for key in given if key not in known]:
        raise BadInput(f"{path}: unknown key {unknown[0]}; a search has {', '.join(known)}")
    if not isinstance(given.get("space"), dict) or not given["space"]:
        raise BadInput(f"{path}: space must name at least one key of the config and what it may be, such as spin.lr: [1.0e-6, 1.0e-5]")
    space = {key: _values(path, key, values) for key, values in given["space"].items()}
    search = Search(**{**given, "space": space})
    for name in ("trials", "concurrent"):
        if not isinstance(getattr(search, name), int) or getattr(search, name) < 1:
            raise BadInput(f"{path}: {name}={getattr(search, name)}: must be a whole number of at least 1")
    if search.metric not in METRICS:
        raise BadInput(f"{path}: metric={search.metric}: choose one of {', '.join(METRICS)}")
    for values in search.fixed:
        if set(values) != set(space):
            raise BadInput(f"{path}: fixed: {values} must give a value to each of {', '.join(space)}")
    for key, values in space.items():
        for value in [values.low, values.high] if isinstance(values, Range) else values:
            try:
                load_config(config, [*overrides, assignment(key, value)])
            except BadInput as error:
                raise BadInput(f"{path}: {error}") from error
    return search


def score(metrics: dict[str, float]) -> float:
    """Of a version, more is better: the probability of the right answer, or what there is where none can be checked."""
    return metrics.get("right_probability", -metrics["real_nll_nats_per_token"])


def assignment(key: str, value: Any) -> str:
    """As on the command line."""
    return f"{key}={value}"


def _values(path: str, key: str, values: Any) -> Range | list[Any]:
    if isinstance(values, list) and values:
        return values
    if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        found = Range(**values)
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (found.low, found.high))
        if numbers and found.low < found.high and (not found.log or found.low > 0):
            return found
    raise BadInput(f"{path}: {key}: give a list of choices, or low and high (and log: true) with low below high; log needs low above 0")
