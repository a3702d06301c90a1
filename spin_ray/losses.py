"""The objectives: pure torch, per pair, no Ray, no model.

SPIN (arXiv 2401.01335, eq. 4.7): for a real answer y and the opponent's answer y' to the same prompt x,

    r(y) = log p(y|x) - log p_t(y|x),      z = beta [r(y) - r(y')],      L = l(z)

with p the main player, p_t the opponent, and log p(y|x) SUMMED over the answer's tokens. beta is the paper's lambda. DPO is the
same with preferred and rejected answers, and theta_0 for p_t. All else is off by default; docs/losses.md says what each is for.

| `loss` | formula | at p == p_t | source |
|---|---|---|---|
| logistic | ln(1 + e^-z) | ln 2 | the paper, section 4.2 |
| hinge | max(0, 1 - z) | 1 | the same |
| exponential | e^-z | 1 | the same |
| correlation | 1 - z | 1 | the same |
| space | -ln s(beta r(y)) - mu ln(1 - s(beta r(y'))), s(r) = 1 / (1 + mu e^-r) | ln(1 + mu) + mu ln(1 + 1/mu) | SPACE, 2512.07175 |
| triplet | ln(1 + e^-(u(y) - u(y'))) + w ln(1 + e^-(u(y') - u(y'_0))), u = beta log p | what p_t gives | T-SPIN, 2601.08198 |

| companion | what it does | source |
|---|---|---|
| `label_smoothing` e | (1 - e) l(z) + e l(-z) | conservative DPO, Mitchell 2023 |
| `length: mean` | log p(y)/|y| for log p(y) in r and u | length-normalised DPO, as in 2405.14734 |
| `length: desensitised` | tokens behind the shorter answer's length weigh `tail_weight` | LD-DPO, 2409.06411 |
| `positive_weight` k | z - beta k max(0, -r(y)) for z | DPO-positive, 2402.13228 |
| `nll_weight` | adds -log p(y)/|y| | Iterative RPO, 2404.19733 |
| `base_share` a | a log p_0 + (1 - a) log p_t for log p_t in r | alpha-SPIN, 2404.04291 |
| `replay_weight` v | a pair that theta_{t-k} wrote weighs v^k | fictitious play, 2404.04291 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from spin_ray.records import Pair

REAL, GENERATED, ANCHOR = range(3)
MARGIN_EDGES = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
"""Borders of the margin's histogram: shares of pairs below the first, between neighbours, and from the last on."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of the answers of N pairs in nats, [N, 3, 2]: real, generated, anchor; the two parts of each (records.py)."""

    policy: torch.Tensor
    opponent: torch.Tensor
    """Of the reference: theta_t; in DPO theta_0."""
    num_tokens: torch.Tensor
    """[N, 3]; 0 where there is no such answer."""
    base: torch.Tensor | None = None
    """Of theta_0, where `base_share` asks for it."""

    @cached_property
    def change(self) -> torch.Tensor:
        """log p - log p_t of whole answers, [N, 3]."""
        return (self.policy - self.opponent).sum(-1)


@dataclass(frozen=True)
class Rewards:
    """What a loss is made of, each [N], in nats times beta."""

    real: torch.Tensor
    """beta r(y)."""
    generated: torch.Tensor
    """beta r(y')."""
    free: torch.Tensor
    """[N, 3], beta log p of the three answers; the anchor's is the generated one's where that is the anchor."""

    @property
    def margin(self) -> torch.Tensor:
        """z."""
        return self.real - self.generated


def _of_margin(decreasing: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Rewards, PairObjective], torch.Tensor]:
    """A loss l(z) with l monotonically decreasing and convex."""

    def loss(rewards: Rewards, objective: PairObjective) -> torch.Tensor:
        z = rewards.margin
        if objective.positive_weight:
            z = z - objective.positive_weight * F.relu(-rewards.real)
        smoothing = objective.label_smoothing
        return decreasing(z) if not smoothing else (1 - smoothing) * decreasing(z) + smoothing * decreasing(-z)

    return loss


def _space(rewards: Rewards, objective: PairObjective) -> torch.Tensor:
    """Each answer against its own reference: real or noise, with `noise_ratio` mu noise answers to a real one.

    s(r) = 1 / (1 + mu e^-r) is the logistic function of r - ln mu. Worked: mu 1, r(y) 2, r(y') -1: ln(1 + e^-2) + ln(1 + e^-1) = 0.4402.
    """
    shift = torch.log(rewards.real.new_tensor(objective.noise_ratio))
    return F.softplus(shift - rewards.real) + objective.noise_ratio * F.softplus(rewards.generated - shift)


def _triplet(rewards: Rewards, objective: PairObjective) -> torch.Tensor:
    """Current advantage of y over y', historical advantage of y' over y'_0; no reference. Worked, weight 1: u = -1, -3, -6:
    ln(1 + e^-2) + ln(1 + e^-3) = 0.1755. In iteration 0 y' is y'_0: the second term is ln 2 and moves nothing.
    """
    real, generated, anchor = rewards.free.unbind(1)
    return F.softplus(generated - real) + objective.anchor_weight * F.softplus(anchor - generated)


LOSSES: dict[str, Callable[[Rewards, PairObjective], torch.Tensor]] = {
    "logistic": _of_margin(lambda z: F.softplus(-z)),
    "hinge": _of_margin(lambda z: F.relu(1 - z)),
    "exponential": _of_margin(lambda z: torch.exp(-z)),
    "correlation": _of_margin(lambda z: 1 - z),
    "space": _space,
    "triplet": _triplet,
}


@dataclass(frozen=True)
class PairObjective:
    """The loss of a pair, what a batch divides by, and how much each pair counts. Fields are the config's keys of the same names."""

    beta: float
    loss: str = "logistic"
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    length: str = "sum"
    tail_weight: float = 0.5
    positive_weight: float = 0.0
    noise_ratio: float = 1.0
    anchor_weight: float = 1.0
    base_share: float = 0.0
    replay_weight: float = 1.0

    def __call__(self, logps: PairLogps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each pair, [N], and detached metrics, each [N] or, for a histogram, [N, bins].

        `pair_loss` is the loss without the NLL term, `expected_pair_loss` what it is where policy == opponent: ln 2 for the logistic,
        whatever beta. Worked: beta 0.1, real +10 nats, generated -10 nats -> margin 2.0, loss ln(1 + e^-2) = 0.1269.
        """
        rewards = self._rewards(logps)
        pair_loss = LOSSES[self.loss](rewards, self)
        nll = -logps.policy[:, REAL].sum(-1) / logps.num_tokens[:, REAL]
        total = pair_loss + self.nll_weight * nll if self.nll_weight else pair_loss
        with torch.no_grad():
            unmoved = LOSSES[self.loss](self._rewards(replace(logps, policy=logps.opponent)), self)
        margin, whole = rewards.margin, logps.policy.sum(-1)
        metrics = {
            "loss": total,
            "pair_loss": pair_loss,
            "expected_pair_loss": unmoved,
            "margin": margin,
            "accuracy": margin > 0,
            "real_logp_change_nats": logps.change[:, REAL],
            "generated_logp_change_nats": logps.change[:, GENERATED],
            "displaced_share": (margin > 0) & (logps.change[:, REAL] < 0),
            "lower_likelihood_share": (margin > 0) & (whole[:, REAL] < whole[:, GENERATED]),
            "real_nll_nats_per_token": nll,
            "margin_histogram": _histogram(margin),
        }
        return total, {name: value.detach().to(margin.dtype) for name, value in metrics.items()}

    def _rewards(self, logps: PairLogps) -> Rewards:
        reference = logps.opponent if logps.base is None else torch.lerp(logps.opponent, logps.base, self.base_share)
        policy = self._measured(logps.policy, logps.num_tokens)
        real, generated, _ = (self.beta * (policy - self._measured(reference, logps.num_tokens))).unbind(1)
        anchor = torch.where(logps.num_tokens[:, ANCHOR] > 0, policy[:, ANCHOR], policy[:, GENERATED])
        return Rewards(real, generated, self.beta * torch.stack([policy[:, REAL], policy[:, GENERATED], anchor], 1))

    def _measured(self, logps: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        """[N, 3, 2] -> what counts as an answer's log-prob, [N, 3]."""
        if self.length == "desensitised":
            return logps[..., 0] + self.tail_weight * logps[..., 1]
        return logps.sum(-1) / num_tokens.clamp(min=1) if self.length == "mean" else logps.sum(-1)

    @property
    def terms(self) -> tuple[str, ...]:
        """What the user is shown of it."""
        return ("loss", "NLL term", "margin") if self.nll_weight else ("loss", "margin")

    def weights(self, pairs: Sequence[Pair]) -> list[float]:
        return [self.replay_weight ** (pair.iteration - pair.opponent_version) for pair in pairs]

    def normalizer(self, pairs: Sequence[Pair]) -> float:
        """What a batch's weighted sum is divided by."""
        return sum(self.weights(pairs))

    def sensitivity(self, tokens_per_answer: float) -> float:
        """How far the loss moves at most, where policy == opponent, per nat in a pair's log-ratio (l is no steeper than 1 there)."""
        terms = 1 + self.positive_weight + (self.anchor_weight if self.loss == "triplet" else 0.0)
        return self.beta * terms / (tokens_per_answer if self.length == "mean" else 1.0)


def _histogram(margin: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, bins], 1 in a pair's bin."""
    place = torch.bucketize(margin.detach(), margin.new_tensor(MARGIN_EDGES), right=True)
    return F.one_hot(place, len(MARGIN_EDGES) + 1)


@dataclass(frozen=True)
class LikelihoodObjective:
    """SFT: the negative log-likelihood of each real answer, summed over its tokens; every answer token of a batch weighs the same."""

    terms = ("NLL",)

    def __call__(self, logps: PairLogps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each pair, [N], and detached metrics, each [N]."""
        nll = -logps.policy[:, REAL].sum(-1)
        return nll, {"loss": nll.detach(), "real_nll_nats_per_token": (nll / logps.num_tokens[:, REAL]).detach()}

    def weights(self, pairs: Sequence[Pair]) -> list[float]:
        return [1.0] * len(pairs)

    def normalizer(self, pairs: Sequence[Pair]) -> float:
        return float(sum(len(pair.real_ids) for pair in pairs))

    def sensitivity(self, tokens_per_answer: float) -> float:
        return 0.0
