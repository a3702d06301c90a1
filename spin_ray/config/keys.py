"""How a key says which values it takes. None, where a key may be that, is always let through."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from typing import Any

from spin_ray.errors import BadInput


def at_least(least: float, default: Any) -> Any:
    """A number that is not below `least`."""
    return field(default=default, metadata={"least": least})


def within(interval: str, default: float) -> Any:
    """A number in an interval such as "(0, 1]": a round bracket leaves the end out."""
    return field(default=default, metadata={"interval": interval})


def one_of(default: Any, *, choices: tuple[Any, ...]) -> Any:
    """One of a few values."""
    return field(default=default, metadata={"choices": choices})


def check_limits(section: Any, prefix: str = "") -> None:
    """Raise BadInput for the first value, of this section and of those in it, that its key does not take."""
    for entry in fields(section):
        key, value = f"{prefix}{entry.name}", getattr(section, entry.name)
        if is_dataclass(value):
            check_limits(value, f"{key}.")
        elif value is not None and (fault := _fault(value, **entry.metadata)):
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
