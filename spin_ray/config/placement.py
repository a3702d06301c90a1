"""Which player computes where."""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.config.keys import one_of


@dataclass
class PlacementConfig:
    mode: str = one_of("auto", choices=("auto", "separate", "shared"))
    """separate: sampler and learner have GPUs of their own and overlap; shared: they take turns on the same GPUs, one iteration's play,
    then its training; auto: shared where the cluster has one GPU, else separate."""
