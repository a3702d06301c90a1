"""Supervised fine-tuning: the real answers alone. What SPIN starts from, and what it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spin_ray.config import Config
from spin_ray.methods.given import Given
from spin_ray.records import Pair, Prompt, real_only

if TYPE_CHECKING:
    from spin_ray.losses import LikelihoodObjective


class Sft(Given):
    scorer = "opponent"
    """The zeros that come with the pairs: there is no reference."""

    def __init__(self, config: Config):
        super().__init__(config.sft)

    def pair(self, prompt: Prompt) -> Pair:
        return real_only(prompt, 0)

    def objective(self, t: int) -> LikelihoodObjective:
        from spin_ray.losses import LikelihoodObjective  # not at the top: it loads torch

        return LikelihoodObjective()
