"""How the players overlap, and who computes the reference log-probs."""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.config.keys import one_of, within


@dataclass
class ReferenceConfig:
    scorer: str = one_of("auto", choices=("auto", "opponent", "frozen", "learner"))
    """Who computes the reference log-probs: opponent (the sampler, while it samples; no memory in the learner), frozen (the
    learner, block by block, with a copy of theta_t: exact, one copy of the weights), or learner (the learner, before the
    iteration's first step: exact, no memory, but training starts when all is sampled). auto: opponent; with model.quantization frozen,
    as the learner's 4-bit kernels and the sampler's do not round alike."""


@dataclass
class OverlapConfig:
    mode: str = one_of("stream", choices=("stream", "sequential", "lookahead"))
    """stream: train on the first finished block while later ones are sampled; sequential: sample all, then train; lookahead:
    a snapshot of the main player, taken before the end of an iteration, plays the next one's first blocks (not exact)."""
    lookahead_fraction: float = within("(0, 1)", 0.1)
    """lookahead: how long before an iteration's end the snapshot is taken, as a share of its optimizer steps, and the share of
    the next iteration's blocks that it plays."""
