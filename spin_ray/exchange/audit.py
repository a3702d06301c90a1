"""The audit: after every weight sync, sampler and learner must give the same answers the same log-probs.

It is one number that checks template, masks, log-probs and weights together. Tied embeddings that were synced without
their second name, for one, show as 0.9 nats per token, and as no error anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spin_ray.errors import RunStopped


class AuditError(RunStopped):
    """Sampler and learner disagree about the model; training on would be against a wrong opponent."""


@dataclass(frozen=True)
class Audit:
    version: int
    mean_nats: float
    """Mean |difference| of log-probs per token."""
    max_nats: float
    num_tokens: int


def compare(version: int, sampler_logps: Sequence[np.ndarray], learner_logps: Sequence[np.ndarray], tolerance: float) -> Audit:
    """Compare log-probs of the same answers, one array [num_tokens] each.

    Raises AuditError with the numbers if the mean |difference| per token exceeds `tolerance` nats, or is not a number.
    """
    difference = np.abs(np.concatenate(sampler_logps) - np.concatenate(learner_logps))
    audit = Audit(version, float(difference.mean()), float(difference.max()), len(difference))
    if not audit.mean_nats <= tolerance:
        raise AuditError(
            f"audit of version {version}: sampler and learner differ by {audit.mean_nats:.4g} nats per token "
            f"(largest {audit.max_nats:.4g}, {audit.num_tokens} tokens), tolerance {tolerance:g}; "
            "the sampler would play with other weights than the main player's"
        )
    return audit


def allowed_first_loss_deviation(beta: float, audit: Audit, tolerance: float, tokens_per_pair: float) -> float:
    """How far the first loss may be from l(0), |dl/dz| <= 1 at z = 0.

    Token differences of up to `tolerance` nats add up like a random walk over a pair's tokens, with a bias of at most the
    measured mean; the factor 4 leaves room for the worst batch. beta 0.1, 1e-3 nats, 100 tokens: 4 * 0.1 * 1e-3 * 10 = 0.004.
    """
    return 4 * beta * tolerance * math.sqrt(tokens_per_pair) + beta * audit.mean_nats * tokens_per_pair
