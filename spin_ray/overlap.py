"""Who plays what, in which order, and who waits for whom: all that differs between the overlap modes. No Ray, no model.

| mode | the main player trains on | the opponent plays iteration t + 1 |
|---|---|---|
| sequential | iteration t when all of it is played | when theta_{t+1} is released |
| stream | each block of iteration t as it is finished, replayed ones first | when theta_{t+1} is released |
| lookahead | the same, blocks played ahead first | its first blocks from a snapshot of the main player, before theta_{t+1} exists |

Ordering contract:

| who waits | for what | unblocked by |
|---|---|---|
| main player, before a block of iteration t | that block, in `sequential` all of them | the coordinator, when the driver puts it there |
| weights theta_{t+1}, before samplers load them | iteration t, and the blocks ahead of t + 1, played | `block_played` of the last of them |
| the snapshot of t + 1, before samplers load it | iteration t played | `block_played` of its last block |
| the evaluation of theta_t | iteration t played | `block_played` of its last block |
| all of them | | `fail`: every present and later wait raises the first error |
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spin_ray.config import Config
from spin_ray.methods import Method
from spin_ray.records import Version


@dataclass(frozen=True)
class BlockSpec:
    """One block of one iteration."""

    iteration: int
    age: int
    """Iterations since its answers were written: 0 in this one; 1 and more: they are replayed, re-scored."""
    index: int
    size: int
    """Pairs in the block."""
    version: Version
    """Who plays it."""
    place: int = 0
    """Place in the iteration's order of training."""

    @property
    def kind(self) -> str:
        """What its file is called by."""
        return ("block", "replay")[self.age] if self.age < 2 else f"replay{self.age}"


class Overlap:
    """The schedule of a run from iteration `first` on, and the waits between its two players. Thread-safe."""

    def __init__(self, config: Config, method: Method, block_sizes: Sequence[int], first: int = 0):
        self._config, self._method, self._sizes, self.first = config, method, list(block_sizes), first
        self._played: set[BlockSpec] = set()
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def blocks(self, t: int) -> list[BlockSpec]:
        """Iteration t's blocks in the order of training: what is ready first comes first."""
        ahead = self._num_ahead(t)
        early = self.snapshot(t - 1)
        versions = [early[1] if early and index < ahead else Version(t) for index in range(len(self._sizes))]
        new = [BlockSpec(t, 0, index, size, versions[index]) for index, size in enumerate(self._sizes)]
        ages = [t - earlier for earlier in self._method.replayed(t)]
        replay = [BlockSpec(t, age, index, size, Version(t)) for age in ages for index, size in enumerate(self._sizes)]
        order = new[:ahead] + replay + new[ahead:]
        return [replace(block, place=place) for place, block in enumerate(order)]

    def num_pairs(self, t: int) -> tuple[int, int]:
        """New and replayed pairs of iteration t."""
        new = sum(self._sizes)
        return new, new * len(self._method.replayed(t))

    def num_steps(self, t: int) -> int:
        """Optimizer steps of iteration t."""
        return self._config.num_steps(sum(self.num_pairs(t)), self._method.num_epochs(t))

    def steps_before(self, t: int) -> int:
        """Optimizer steps of all iterations before t."""
        return sum(map(self.num_steps, range(t)))

    def snapshot(self, t: int) -> tuple[int, Version] | None:
        """(optimizer steps taken, version) of the snapshot in iteration t that plays ahead into t + 1; None: there is none.

        Its staleness is `lookahead_fraction` of the iteration's steps. 100 steps, fraction 0.1: taken after 90, 10 early.
        """
        return self._planned_snapshot(t) if t >= self.first else None  # what was before this session is gone

    def _planned_snapshot(self, t: int) -> tuple[int, Version] | None:
        if self._config.overlap.mode != "lookahead" or not 0 <= t < self._method.num_iterations - 1:
            return None
        early = math.ceil(self._config.overlap.lookahead_fraction * self.num_steps(t))
        return self.num_steps(t) - early, Version(t + 1, early)

    @property
    def waits_for_all(self) -> bool:
        """Whether the main player starts an iteration only when all of it is played."""
        return self._config.overlap.mode == "sequential"

    @property
    def max_steps_early(self) -> int:
        """The bound of staleness: optimizer steps that any pair's writer may be short of its version; 0 but in `lookahead`."""
        planned = [self._planned_snapshot(t) for t in range(self._method.num_iterations)]
        return max((snapshot[1].steps_early for snapshot in planned if snapshot), default=0)

    def starts_stale(self, t: int) -> bool:
        """Whether the first pairs of iteration t are, or in an earlier session may have been, played by a snapshot."""
        return self._num_ahead(t) > 0

    def blocks_ahead(self, t: int) -> list[BlockSpec]:
        """Those of iteration t that the snapshot plays, if there is one."""
        return self.blocks(t)[: self._num_ahead(t)]

    def _num_ahead(self, t: int) -> int:
        """Blocks of iteration t that the snapshot plays: the same fraction of them, the first ones."""
        return math.ceil(self._config.overlap.lookahead_fraction * len(self._sizes)) if self._planned_snapshot(t - 1) else 0

    def block_played(self, block: BlockSpec) -> None:
        with self._changed:
            self._played.add(block)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End every wait with this error; only the first one counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait_until_may_evaluate(self, version: int) -> None:
        """Until theta_version has played its own iteration, here or in an earlier session: before that it has better things to do."""
        self._wait_for(self.blocks(version) if self.first <= version < self._method.num_iterations else [])

    def wait_until_may_load(self, version: Version) -> None:
        """Until everything that earlier weights have to play is played."""
        before = self.blocks(version.number - 1) if version.number > self.first else []
        here = self.blocks(version.number) if version.number < self._method.num_iterations else []
        self._wait_for([block for block in [*before, *here] if block.version.precedes(version)])

    def _wait_for(self, blocks: Sequence[BlockSpec]) -> None:
        missing = set(blocks)
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or missing <= self._played)
        if self._error:
            raise self._error
