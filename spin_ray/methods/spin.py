"""SPIN (arXiv 2401.01335) and its relatives: theta_t answers, and is the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spin_ray.config import Config, SpinConfig, at
from spin_ray.methods.pairs import pair_objective
from spin_ray.records import Pair, Prompt

if TYPE_CHECKING:
    from spin_ray.losses import PairObjective


class Spin:
    plays = True

    def __init__(self, config: Config):
        self._spin = config.spin
        self.num_iterations, self.scorer = config.spin.num_iterations, config.scorer
        self.anchored = config.spin.loss == "triplet"

    def replayed(self, t: int) -> range:
        return range(t - 1, max(t - 1 - self._spin.replay, -1), -1)

    def needed(self, t: int) -> set[int]:
        return {*self.replayed(t), *([0] if self.anchored and t else [])}

    def pair(self, prompt: Prompt) -> Pair:
        raise NotImplementedError("the opponent writes SPIN's pairs")

    def mixes_in_base(self, t: int) -> bool:
        return t > 0 and self._spin.base_share > 0

    def objective(self, t: int) -> PairObjective:
        spin = self._at(t)
        return pair_objective(
            spin, anchor_weight=spin.anchor_weight, base_share=spin.base_share, replay_weight=spin.replay_weight,
        )

    def lr(self, t: int) -> float:
        return self._at(t).lr

    def num_epochs(self, t: int) -> int:
        return self._at(t).num_epochs

    def _at(self, t: int) -> SpinConfig:
        return at(self._spin, t)
