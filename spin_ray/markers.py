"""Markers in place of what a row says, so that it can be seen which of it a chat template writes.

Texts become letters and digits that no template trims, splits or escapes, numbers become numbers that no row has. What tells a
template how to write (a type, an id whose length some check, true and false) stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

MARK = "Zq7markerqZ"
"""Stands for a text."""
_FIRST_NUMBER = 70_000_001
_KEPT = frozenset(("type", "id", "index", "tool_call_id", "call_id", "$schema"))
"""Keys whose values are not marked, but among the arguments of a call, whose names are the tool's own."""
_OWN_NAMES = {"arguments": math.inf, "properties": 1, "$defs": 1, "definitions": 1}
"""Keys under which names are the row's own, and how deep."""

Path = tuple[str | int, ...]


class Leaf(NamedTuple):
    """A text or a number of a nested value."""

    path: Path
    mark: str
    """What the marked value shows in its place, as text."""

    def __str__(self) -> str:
        """As a user would write it: `tool_calls[1].function.name`."""
        return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path).lstrip(".")


def marked(value: Any, path: Path, count: Iterator[int], leaves: list[Leaf]) -> Any:
    """The value with a marker for every leaf; these are added to `leaves`. `count` gives every leaf a number of its own."""
    if isinstance(value, dict):
        return {key: item if _is_kept((*path, key)) else marked(item, (*path, key), count, leaves) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, (*path, place), count, leaves) for place, item in enumerate(value)]
    new = _marker(value, next(count))
    if new is not None:
        leaves.append(Leaf(path, str(new)))
    return value if new is None else new


def marked_only(value: Any, path: Path, leaf: Leaf) -> Any:
    """The value with a marker for that one leaf."""
    if path == leaf.path:
        return _marker(value, 0)
    if isinstance(value, dict):
        return {key: marked_only(item, (*path, key), leaf) for key, item in value.items()}
    if isinstance(value, list):
        return [marked_only(item, (*path, place), leaf) for place, item in enumerate(value)]
    return value


def skeleton(value: Any, *, own: float = 0) -> Any:
    """What values of one shape have in common, hashable: keys, and types of leaves. Names that are the row's own, `own` levels
    deep, do not count, nor how many equal items a list has behind its second.
    """
    if isinstance(value, dict):
        inside = {key: skeleton(item, own=max(own - 1, 0 if own else _OWN_NAMES.get(key, 0))) for key, item in value.items()}
        return frozenset(("*" if own else key, item) for key, item in inside.items())
    if isinstance(value, list):
        items = [skeleton(item, own=own) for item in value]
        return tuple(items[:2]), frozenset(items[2:])
    return type(value).__name__


def _marker(value: Any, number: int) -> str | int | float | None:
    """A marker of the value's type; None where there is none."""
    if isinstance(value, str) and value.strip():
        return f"Zq7k{number}qZ"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return _FIRST_NUMBER + number + (0.5 if isinstance(value, float) else 0)


def _is_kept(path: Path) -> bool:
    return path[-1] in _KEPT and "arguments" not in path[:-1] and path[-2:-1] != ("properties",)
