"""The objectives: pure torch, per pair, no Ray, no model.

SPIN (arXiv 2401.01335, eq. 4.7): for a real answer y and the opponent's answer y' to the same prompt x,

    z = beta * [log p(y|x) - log p_t(y|x)]  -  beta * [log p(y'|x) - log p_t(y'|x)],      L = l(z)

with p the main player, p_t the opponent, and log p(y|x) SUMMED over the answer's tokens. beta is the paper's lambda.

Deviations from the paper, each off by default:
1. `nll_weight` adds a per-token negative log-likelihood of y, against the fall of log p(y) (Iterative RPO, arXiv 2404.19733).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOSSES = {
    "logistic": lambda z: F.softplus(-z),
    "hinge": lambda z: F.relu(1 - z),
    "exponential": lambda z: torch.exp(-z),
    "correlation": lambda z: 1 - z,
}
"""The paper's l, section 4.2: monotonically decreasing and convex in z."""

LOSS_AT_ZERO = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}
"""l(0): the loss when main player and opponent are the same model, whatever beta."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of both answers of every pair, summed over the answer's tokens, in nats; every field is [num_pairs]."""

    policy_real: torch.Tensor
    policy_generated: torch.Tensor
    opponent_real: torch.Tensor
    opponent_generated: torch.Tensor
    num_real_tokens: torch.Tensor


def spin_loss(
    logps: PairLogps, *, beta: float, loss: str = "logistic", nll_weight: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """SPIN loss of each pair.

    Returns the loss [num_pairs] and detached metrics, each [num_pairs]. At policy == opponent `spin_loss` is l(0): ln 2
    for the logistic. Worked: beta 0.1, real +10 nats, generated -10 nats -> margin 2.0, loss ln(1 + e^-2) = 0.1269.
    """
    real_change = logps.policy_real - logps.opponent_real
    generated_change = logps.policy_generated - logps.opponent_generated
    margin = beta * (real_change - generated_change)
    spin = LOSSES[loss](margin)
    nll = -logps.policy_real / logps.num_real_tokens
    total = spin + nll_weight * nll if nll_weight else spin
    metrics = {
        "loss": total,
        "spin_loss": spin,
        "margin": margin,
        "accuracy": margin > 0,
        "real_logp_change_nats": real_change,
        "generated_logp_change_nats": generated_change,
        "displaced_share": (margin > 0) & (real_change < 0),
        "real_nll_nats_per_token": nll,
    }
    return total, {name: value.detach().to(margin.dtype) for name, value in metrics.items()}


def sft_loss(logps: PairLogps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of each real answer, summed over its tokens; the batch divides by its number of tokens.

    Returns the loss [num_pairs] and detached metrics, each [num_pairs].
    """
    nll = -logps.policy_real
    return nll, {"loss": nll.detach(), "real_nll_nats_per_token": (nll / logps.num_real_tokens).detach()}
