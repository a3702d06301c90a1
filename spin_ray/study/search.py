"""What a search tries: a YAML file that names keys of the config, and for each a list of choices or a range.

    trials: 12
    space:
      spin.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
      spin.loss: [logistic, space]
"""

from __future__ import annotations

import json
import math
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

    def __contains__(self, value: Any) -> bool:
        return _is_number(value, int if self.whole else (int, float)) and self.low <= value <= self.high

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Search:
    space: dict[str, Range | list[Any]]
    """Key of the config -> what it may be."""
    trials: int = 12
    metric: str = "auto"
    """Held-out metric; auto: exact match at temperature 1 where answers can be checked, else the NLL of the real answers."""
    concurrent: int = 1
    """Runs at a time."""
    seed: int = 0
    prune: bool = True
    """End a run at an iteration's border where its metric is below the median of the others there."""
    fixed: list[dict[str, Any]] = field(default_factory=list)
    """Values that are tried first, one dictionary each."""


def read_search(path: str, config: str, overrides: Sequence[str]) -> Search:
    """Read a search, and check that a run could be started with every choice, either end of every range, and all fixed values.

    Raises BadInput.
    """
    given = read_yaml(path)
    known = [entry.name for entry in fields(Search)]
    if unknown := [key for key in given if key not in known]:
        raise BadInput(f"{path}: unknown key {unknown[0]}; a search has {', '.join(known)}")
    if not isinstance(given.get("space"), dict) or not given["space"]:
        raise BadInput(f"{path}: space must name at least one key of the config and what it may be, such as spin.lr: [1.0e-6, 1.0e-5]")
    space = {key: _values(path, key, values) for key, values in given["space"].items()}
    search = Search(**{**given, "space": space})
    _check(path, search)
    ends = [{key: value} for key, values in space.items() for value in ([values.low, values.high] if isinstance(values, Range) else values)]
    for values in [*ends, *search.fixed]:
        try:
            load_config(config, [*overrides, *assignments(values)])
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
    return search


def assignments(values: dict[str, Any]) -> list[str]:
    """As on the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _check(path: str, search: Search) -> None:
    for name in ("trials", "concurrent"):
        if not _is_number(getattr(search, name), int) or getattr(search, name) < 1:
            raise BadInput(f"{path}: {name}={getattr(search, name)}: must be a whole number of at least 1")
    if not _is_number(search.seed, int) or search.seed < 0:
        raise BadInput(f"{path}: seed={search.seed}: must be a whole number of at least 0")
    if not isinstance(search.prune, bool):
        raise BadInput(f"{path}: prune={search.prune}: must be true or false")
    if search.metric not in METRICS:
        raise BadInput(f"{path}: metric={search.metric}: choose one of {', '.join(METRICS)}")
    if not isinstance(search.fixed, list):
        raise BadInput(f"{path}: fixed: give a list, one dictionary of values for each trial")
    for values in search.fixed:
        if not isinstance(values, dict) or set(values) != set(search.space):
            raise BadInput(f"{path}: fixed: {values} must give a value to each of {', '.join(search.space)}")
        for key, value in values.items():
            if value not in search.space[key]:
                raise BadInput(f"{path}: fixed: {key}={value} is not in the space that is searched")


def _values(path: str, key: str, values: Any) -> Range | list[Any]:
    if isinstance(values, list) and values:
        return values
    if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        found = Range(**values)
        numbers = all(_is_number(end, (int, float)) for end in (found.low, found.high)) and isinstance(found.log, bool)
        if numbers and found.low < found.high and (not found.log or found.low > 0):
            return found
    raise BadInput(f"{path}: {key}: give a list of choices, or low and high (and log: true) with low below high; log needs low above 0")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
