"""What methods share whose pairs are the rows themselves: one training, nothing is played."""

from __future__ import annotations

from spin_ray.config import DpoConfig, SftConfig, at


class Given:
    num_iterations, plays, anchored = 1, False, False

    def __init__(self, section: DpoConfig | SftConfig):
        self._section = at(section, 0)

    def replayed(self, t: int) -> range:
        return range(0)

    def needed(self, t: int) -> set[int]:
        return set()

    def mixes_in_base(self, t: int) -> bool:
        return False

    def lr(self, t: int) -> float:
        return self._section.lr

    def num_epochs(self, t: int) -> int:
        return self._section.num_epochs
