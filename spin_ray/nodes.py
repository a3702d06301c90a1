"""The nodes of a cluster: what each has, which of them a label selector means, and whether the actors of a run fit on them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spin_ray.errors import BadInput


class DoNotFit(BadInput):
    """The actors of a run and the nodes of a cluster do not go together; more nodes could mend it."""


_EPSILON = 1e-6
_ONE_OF = re.compile(r"(!?)in\((.*)\)")

Selector = Mapping[str, str]
"""Label -> what it must be, as Ray has it: `value`, `!value`, `in(a,b)`, `!in(a,b)`. A label that is not there is none of these values."""


@dataclass(frozen=True)
class Node:
    name: str
    """Its address."""
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def is_meant(self, selector: Selector) -> bool:
        return all(_is_meant(self.labels.get(label), wanted) for label, wanted in selector.items())


def _is_meant(value: str | None, wanted: str) -> bool:
    if several := _ONE_OF.fullmatch(wanted):
        return (value in [each.strip() for each in several[2].split(",")]) != bool(several[1])
    return value != wanted[1:] if wanted.startswith("!") else value == wanted


@dataclass(frozen=True)
class Actors:
    """Actors of one kind, each on one node."""

    who: str
    number: int
    each: Mapping[str, float]
    """Resource -> amount."""
    selector: Selector = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.number} {self.who}{'s' if self.number > 1 else ''}"


def in_amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(resource, 0):g} {resource}" for resource in ("GPU", "CPU"))


def total(nodes: Sequence[Node], resource: str) -> float:
    return sum(node.resources.get(resource, 0) for node in nodes)


def check_fit(nodes: Sequence[Node], wanted: Sequence[Actors]) -> None:
    """Raise DoNotFit for what could never start: by the sums of all nodes if they tell, else node by node."""
    wanted = [kind for kind in wanted if kind.number]
    for resource in dict.fromkeys(resource for kind in wanted for resource in kind.each):
        need, have = sum(kind.number * kind.each.get(resource, 0) for kind in wanted), total(nodes, resource)
        if need > have + _EPSILON:
            parts = " + ".join(f"{kind} × {kind.each[resource]:g}" for kind in wanted if kind.each.get(resource))
            raise DoNotFit(f"the cluster has {have:g} {resource}, this run needs {need:g} = {parts}; {_said(nodes)}; {_REMEDY}")
    for kind in wanted:
        if kind.selector and not any(node.is_meant(kind.selector) for node in nodes):
            needs = f"{kind}, each needs {_amounts(kind)} on one"
            raise DoNotFit(f"no node of the cluster has the labels of the {kind.who}: {_labels(kind.selector)} ({needs}); {_said(nodes)}")
    fewest: dict[str, int] | None = None
    for order in itertools.permutations(wanted):
        left = _left_over(nodes, order)
        if not left:
            return
        fewest = left if fewest is None or sum(left.values()) < sum(fewest.values()) else fewest
    kind = next(kind for kind in wanted if kind.who in (fewest or ()))
    where = f" with {_labels(kind.selector)}" if kind.selector else ""
    raise DoNotFit(f"{fewest[kind.who]} of {kind} fit on no node{where}: each needs {_amounts(kind)} on one; {_said(nodes)}; {_REMEDY}")


def _amounts(kind: Actors) -> str:
    return ", ".join(f"{amount:g} {resource}" for resource, amount in kind.each.items() if amount)


_REMEDY = "lower sampler.num_replicas or learner.num_workers, or add nodes"


def _left_over(nodes: Sequence[Node], order: Sequence[Actors]) -> dict[str, int]:
    """What finds no place, kind -> number, when kind after kind fills first the nodes that fewest of the later ones may have.

    Where amounts are multiples of each other, as GPUs are, some order of kinds finds a place for all if there is one.
    """
    free = [dict(node.resources) for node in nodes]
    left_over = {}
    for place, kind in enumerate(order):
        meant = [number for number, node in enumerate(nodes) if node.is_meant(kind.selector)]
        meant.sort(key=lambda number: sum(nodes[number].is_meant(later.selector) for later in order[place + 1 :]))
        left = kind.number
        for number in meant:
            room = [int((free[number].get(resource, 0) + _EPSILON) / amount) for resource, amount in kind.each.items() if amount]
            placed = min([left, *room])
            for resource, amount in kind.each.items():
                free[number][resource] = free[number].get(resource, 0) - placed * amount
            left -= placed
        if left:
            left_over[kind.who] = left
    return left_over


def _labels(selector: Selector) -> str:
    return ", ".join(f"{label}={wanted}" for label, wanted in selector.items())


_MOST_SAID = 6


def _said(nodes: Sequence[Node]) -> str:
    """Every node with what it has, or the first few."""
    said = []
    for node in nodes[:_MOST_SAID]:
        labels = _labels({label: value for label, value in node.labels.items() if not label.startswith("ray.io/")})
        said.append(f"{node.name} has {in_amounts(node.resources)}{', ' * bool(labels)}{labels}")
    return "; ".join(said) + (f"; and {len(nodes) - _MOST_SAID} more" if len(nodes) > _MOST_SAID else "")
