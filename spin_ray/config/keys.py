"""How a key says which values it takes. None, where a key may be that, is always let through."""

from __future__ import annotations

import math
from dataclasses import field, fields, is_dataclass, replace
from typing import Any

from spin_ray.errors import BadInput


def at_least(least: float, default: Any) -> Any:
    """A number that is not below `least`."""
    return field(default=default, metadata={"least": least})


def within(interval: str, default: float | None) -> Any:
    """A number in an interval such as "(0, 1]": a round bracket leaves the end out."""
    return field(default=default, metadata={"interval": interval})


def one_of(default: Any, *, choices: tuple[Any, ...]) -> Any:
    """One of a few values."""
    return field(default=default, metadata={"choices": choices})


def per_iteration(default: Any, *, above: float | None = None, least: float | None = None, whole: bool = False) -> Any:
    """A number, or a list of one for every iteration: above or at least some number, perhaps a whole one."""
    return field(default=default, metadata={_SCHEDULE: (above, least, whole)})


def bounds(count: int | dict[str, int]) -> tuple[int, int]:
    """The fewest and the most that a key with a number, or with {min: ..., max: ...}, allows."""
    return (count["min"], count["max"]) if isinstance(count, dict) else (count, count)


class Bounded:
    """A section that says how many players of a kind there are: with a number, or with two bounds."""

    COUNT = ""
    """Its key."""

    @property
    def fewest(self) -> int:
        return bounds(getattr(self, self.COUNT))[0]

    @property
    def most(self) -> int:
        return bounds(getattr(self, self.COUNT))[1]

    @property
    def is_elastic(self) -> bool:
        """Whether their number may change while a run goes on."""
        return self.fewest < self.most


def check_bounds(key: str, count: Any) -> None:
    """Raise BadInput for what is neither such a number nor such a mapping."""
    if isinstance(count, dict) and count.keys() != {"min", "max"}:
        raise BadInput(f"{key}={count}: give a number, or {{min: 1, max: 8}}")
    fewest, most = bounds(count)
    if not all(type(each) is int and each >= 1 for each in (fewest, most)):
        raise BadInput(f"{key}={count}: must be at least 1, a whole number")
    if fewest > most:
        raise BadInput(f"{key}={count}: min is larger than max")


_SCHEDULE = "schedule"


def at(section: Any, iteration: int) -> Any:
    """The section in one iteration: of every key that has a value per iteration that value."""
    given = {key: getattr(section, key) for key in scheduled(section)}
    return replace(section, **{key: value[iteration] if isinstance(value, list) else value for key, value in given.items()})


def check_schedules(section: Any, name: str, num_iterations: int) -> None:
    """Raise BadInput for the first key of the section that has another number of values, or one that it does not take."""
    for key, (above, least, whole) in scheduled(section).items():
        value, bound = getattr(section, key), f"above {above:g}" if above is not None else f"of at least {least:g}"
        if isinstance(value, list) and len(value) != num_iterations:
            raise BadInput(f"{name}.{key} has {len(value)} values for {num_iterations} iterations; give one value, or one per iteration")
        for number in value if isinstance(value, list) else [value]:
            fits = isinstance(number, int if whole else (int, float)) and not isinstance(number, bool) and math.isfinite(number)
            if not fits or (above is not None and number <= above) or (least is not None and number < least):
                raise BadInput(f"{name}.{key}={value}: must be a {'whole ' * whole}number {bound}, or a list of one per iteration")


def scheduled(section: Any) -> dict[str, tuple[float | None, float | None, bool]]:
    """The section's keys that may have a value per iteration, and what each takes."""
    return {entry.name: entry.metadata[_SCHEDULE] for entry in fields(section) if _SCHEDULE in entry.metadata}


def check_limits(section: Any, prefix: str = "") -> None:
    """Raise BadInput for the first value, of this section and of those in it, that its key does not take."""
    for entry in fields(section):
        key, value = f"{prefix}{entry.name}", getattr(section, entry.name)
        if is_dataclass(value):
            check_limits(value, f"{key}.")
        elif value is not None and _SCHEDULE not in entry.metadata and (fault := _fault(value, **entry.metadata)):
            raise BadInput(f"{key}={value}: {fault}")


def _fault(value: Any, *, least: float | None = None, interval: str = "", choices: tuple[Any, ...] = ()) -> str:
    if choices and value not in choices:
        return f"choose one of {', '.join(map(str, choices))}"
    if least is not None and not value >= least:
        return "must not be negative" if least == 0 else f"must be at least {least}"
    if interval and not _inside(value, interval):
        return f"must be in {interval}"
    return ""


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    return low <= value <= high and (value != low or interval[0] == "[") and (value != high or interval[-1] == "]")
