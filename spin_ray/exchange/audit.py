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


class FirstLossError(RunStopped):
    """The first loss of an iteration is not l(0): sampler and learner do not see the same model or tokens."""


@dataclass(frozen=True)
class Audit:
    version: int
    """Number of the version that both hold."""
    mean_nats: float
    """Mean |difference| of log-probs per token."""
    max_nats: float
    bias_nats: float
    """Mean difference with its sign: what adds up over an answer."""
    rms_nats: float
    """Root mean square difference: what grows like a random walk."""
    num_tokens: int


def compare(
    version: int, sampler_logps: Sequence[np.ndarray], learner_logps: Sequence[np.ndarray], tolerance: float, *, other: str = "learner"
) -> Audit:
    """Compare log-probs of the same answers, one array [num_tokens] each; `other` names who has given the second.

    Raises AuditError with the numbers if the mean |difference| per token exceeds `tolerance` nats, or is not a number.
    """
    signed = np.concatenate(sampler_logps).astype(np.float64) - np.concatenate(learner_logps)
    size = np.abs(signed)
    audit = Audit(version, float(size.mean()), float(size.max()), float(signed.mean()), float(np.sqrt((size**2).mean())), len(size))
    if not audit.mean_nats <= tolerance:
        raise AuditError(
            f"audit of version {version}: sampler and {other} differ by {audit.mean_nats:.4g} nats per token "
            f"(largest {audit.max_nats:.4g}, {audit.num_tokens} tokens), tolerance {tolerance:g}; "
            "they do not compute the same model"
        )
    return audit


def pair_mismatch(audit: Audit, tokens_per_pair: float) -> float:
    """How far a pair's log-ratio may be off by the engines' difference alone, in nats.

    Over a pair's tokens the bias adds up and the rest grows like a random walk, of which 4 standard deviations are allowed.
    rms 0.01 nats, no bias, 100 tokens: 4 * 0.01 * 10 = 0.4.
    """
    return 4 * audit.rms_nats * math.sqrt(tokens_per_pair) + abs(audit.bias_nats) * tokens_per_pair


def check_first_loss(iteration: int, loss: float, *, expected: float, mismatch: float) -> float:
    """Invariant 2: at the first step main player and opponent are the same model, so the loss is known. Returns the deviation.

    `mismatch` is how far `pair_mismatch` moves the loss, whose slope grows with it where it is above 1 (the exponential's): the audit
    explains that much; 1e-3 of the loss covers the arithmetic. Raises FirstLossError past it.
    """
    deviation, allowed = abs(loss - expected), (1e-3 + mismatch) * max(1.0, abs(expected))
    if not deviation <= allowed:
        raise FirstLossError(
            f"first loss of iteration {iteration} is {loss:.6f}, expected {expected:.6f} ± {allowed:.6f}, because main player and "
            "opponent are the same model there; sampler and learner disagree about weights, template or log-probs"
        )
    return deviation
