"""How many samplers a run needs: as few as keep the main player from waiting, by the rates that were measured. No Ray, no clock.

The main player reads an iteration's pairs in order, so generation is hidden if all of it can be played while its first epoch is
trained:

    needed = (new / drawn per second + replayed / scored per second, of one sampler) / ((new + replayed) / trained per second)

| a count other than the present one takes effect | why |
|---|---|
| more: when it was needed `GROW_AFTER` times in a row, and at most twice as many | a rate that was measured over a few blocks may be off |
| fewer: when `1 + SLACK` times what is needed was less `SHRINK_AFTER` times in a row | who goes takes minutes to come back |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

GROW_AFTER, SHRINK_AFTER, SLACK = 2, 6, 0.1


@dataclass(frozen=True)
class Rates:
    """What was measured, in pairs per second; 0: not yet."""

    drawn: float
    """New pairs, of one sampler that has enough to do."""
    scored: float
    """Replayed ones, which are only scored."""
    trained: float
    """Of the main player when it does not wait."""


def needed(rates: Rates, new: int, replayed: int) -> float | None:
    """Samplers that keep up with the main player in an iteration of so many pairs, a fraction; None: the rates do not tell yet."""
    if not rates.drawn or not rates.trained or (replayed and not rates.scored):
        return None
    play_s = new / rates.drawn + (replayed / rates.scored if replayed else 0.0)
    return play_s * rates.trained / max(new + replayed, 1)


@dataclass
class Scale:
    """Decides how many samplers there should be, at least `fewest` and at most `most`."""

    fewest: int
    most: int
    _more: int = field(default=0, init=False)
    _fewer: int = field(default=0, init=False)
    """How often in a row that was needed."""

    def wanted(self, present: int, need: float | None) -> int:
        """From now on, where `present` are there or on their way and `need` keep up."""
        if need is None:
            return present
        enough, ample = self._within(math.ceil(need - 1e-9)), self._within(math.ceil(need * (1 + SLACK) - 1e-9))
        self._more = self._more + 1 if enough > present else 0
        self._fewer = self._fewer + 1 if ample < present else 0
        if self._more >= GROW_AFTER:
            self._more = 0
            return min(enough, 2 * present)
        if self._fewer >= SHRINK_AFTER:
            self._fewer = 0
            return ample
        return self._within(present)

    def _within(self, count: int) -> int:
        return min(max(count, self.fewest), self.most)


@dataclass
class Meter:
    """Pairs per second of one sampler, of one kind of block, while there was enough to do."""

    pairs: float = 0.0
    sampler_s: float = 0.0
    """Seconds, times the samplers that were up."""

    def add(self, pairs: int, seconds: float, samplers: int) -> None:
        self.pairs, self.sampler_s = self.pairs * FADING + pairs, self.sampler_s * FADING + seconds * samplers

    @property
    def rate(self) -> float:
        return self.pairs / self.sampler_s if self.sampler_s > 0 else 0.0


FADING = 0.98
"""What a block leaves of the weight of those before it: the last fifty count."""


class Scaler:
    """Looks, while blocks are played, whether the samplers are too few or too many."""

    def __init__(
        self, fewest: int, most: int, *, size: Callable[[], tuple[int, int]], change: Callable[[int, float], None],
        look_every_s: float = 2.0, clock: Callable[[], float] = time.monotonic,
    ):
        """`size` tells how many samplers are up, and how many there are; `change` hears by how many that is to change, and the need."""
        self._scale, self._size, self._change = Scale(fewest, most), size, change
        self._look_every_s, self._clock = look_every_s, clock
        self._drawn, self._scored = Meter(), Meter()
        self._trained = 0.0
        self._last = self._looked = clock()
        self._up = 0

    def opened(self) -> None:
        """An iteration's play begins: before, the samplers had nothing to do."""
        self._last = self._clock()

    def trained(self, pairs_per_s: float) -> None:
        """What the main player's last step came to, waiting left out."""
        self._trained = pairs_per_s if not self._trained else 0.9 * self._trained + 0.1 * pairs_per_s

    def played(self, pairs: int, *, replayed: bool, new_in_all: int, replayed_in_all: int) -> None:
        """A block is finished, of an iteration with so many pairs in all."""
        now = self._clock()
        if self._up:
            (self._scored if replayed else self._drawn).add(pairs, now - self._last, self._up)
        self._last = now
        if self._up and now - self._looked < self._look_every_s:
            return
        self._looked = now
        self._up, present = self._size()
        need = needed(Rates(self._drawn.rate, self._scored.rate, self._trained), new_in_all, replayed_in_all)
        if difference := self._scale.wanted(present, need) - present:
            self._change(difference, need or 0.0)
