"""What methods that learn from pairs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spin_ray.config import PairLossConfig

if TYPE_CHECKING:
    from spin_ray.losses import PairObjective


def pair_objective(section: PairLossConfig, **more: Any) -> PairObjective:
    """The objective of a section that holds one iteration's values; `more`: what only one method has."""
    from spin_ray.losses import PairObjective  # not at the top: it loads torch

    keys = ("beta", "loss", "nll_weight", "label_smoothing", "length", "tail_weight", "positive_weight", "noise_ratio")
    return PairObjective(**{key: getattr(section, key) for key in keys}, **more)
