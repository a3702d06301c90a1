"""DPO (arXiv 2305.18290) on given preference rows: the rejected answer stands where the generated one does, theta_0 is the reference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from spin_ray.config import Config
from spin_ray.methods.given import Given
from spin_ray.methods.pairs import pair_objective
from spin_ray.records import NO_LOGPS, Pair, Prompt, real_only

if TYPE_CHECKING:
    from spin_ray.losses import PairObjective


class Dpo(Given):
    def __init__(self, config: Config):
        super().__init__(config.dpo)
        self.scorer = "frozen" if config.scorer == "frozen" else "learner"
        """All rows are there at once: the learner scores them before its first step, or block by block with a copy of theta_0."""

    def pair(self, prompt: Prompt) -> Pair:
        return dataclasses.replace(real_only(prompt, 0), generated_ids=prompt.rejected_ids, opponent_real_logps=NO_LOGPS)

    def objective(self, t: int) -> PairObjective:
        return pair_objective(self._section)
