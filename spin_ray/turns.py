"""Taking turns: several players on the same devices, one of them at a time.

A player that holds the devices may compute on them. All others are at rest: they have given their memory back, answer nothing, and whatever
of them starts meanwhile, in place of a process that died, waits.

| who | may | and then |
|---|---|---|
| the thread that drives the run | `give_to` another player | the holder ends what it owes and rests; only then the other one wakes |
| a holder that dies | start anew | it still holds the devices |
| a player at rest that dies | start anew, up to where it would need the devices | it goes on when it is given them |
| a holder that cannot rest | raise, from `give_to` | it still holds them, and the run ends: nobody else may wake beside it |
| a player that cannot wake | raise, from `give_to` | it holds them: the other one has given them away |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from spin_ray.errors import BadInput
from spin_ray.records import Devices

OPPONENT, MAIN_PLAYER = "opponent", "main player"


class Player(Protocol):
    def rest(self) -> None:
        """End what is owed, and give the devices' memory back; returns when it is free."""

    def wake(self) -> None:
        """Take it back, or begin to."""


class Turns:
    """Who holds the devices. Used by one thread."""

    def __init__(self, players: Mapping[str, Player], holder: str):
        self._players, self.holder = dict(players), holder

    def give_to(self, name: str) -> None:
        """Let this player hold the devices; nothing if it does."""
        if name == self.holder:
            return
        self._players[self.holder].rest()
        self.holder = name
        self._players[name].wake()


def check_shared(samplers: Devices, workers: Devices) -> None:
    """Raise BadInput unless the devices of one kind of player are all among those of the other, each given to one of a kind.

    On CPUs there are none.
    """
    for who, devices in (("samplers", samplers), ("workers of the main player", workers)):
        if twice := next((device for device in devices if devices.count(device) > 1), None):
            raise BadInput(f"placement.mode=shared: two {who} were given the same GPU ({_in_words(twice)}); set placement.mode=separate")
    apart = set(samplers) - set(workers), set(workers) - set(samplers)
    if all(apart):
        raise BadInput(
            f"placement.mode=shared: Ray gave a sampler the GPU {_in_words(min(apart[0]))} and the main player {_in_words(min(apart[1]))}: "
            "they share none; set placement.mode=separate"
        )


def _in_words(device: tuple[str, int]) -> str:
    node, number = device
    return f"{number} of node {node[:8]}"
