"""Numbers of held-out prompts: how good a version's answers are, how far it has moved, and whether it still tells y from y'.

The **held-out advantage** is the discriminator of the paper on prompts that nobody trained on: theta_{t+1} is shown the real answer y
and a fresh answer y' of theta_t, and prefers y if r(y) > r(y'), r = log p_{t+1} - log p_t. At the paper's equilibrium it cannot tell.

A version's answers are kept as pairs (records.py) whose opponent, and scorer, is that version. No Ray, no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from spin_ray.losses import LikelihoodObjective, PairLogps, PairObjective
from spin_ray.records import Completion, Pair, Prompt, opponent_reference, real_only

OF_BEFORE = "before_generated_logps"
"""Column of a version's answers: its log-probs of what the version before answered to the same prompt; [] where it was not asked."""


def as_pairs(version: int, prompts: Sequence[Prompt], drawn: Sequence[Completion], real_logps: Sequence[np.ndarray]) -> list[Pair]:
    """What a version answered at temperature 1, with its log-probs of its own and of the real answers."""
    return [
        replace(
            real_only(prompt, version), generated_ids=completion.token_ids, opponent_generated_logps=completion.logps,
            opponent_real_logps=logps, finish_reason=completion.finish_reason,
        )
        for prompt, completion, logps in zip(prompts, drawn, real_logps, strict=True)
    ]


def quality(pairs: Sequence[Pair], right: np.ndarray | None, greedy_right: np.ndarray | None) -> dict[str, float]:
    """Metrics of one version by itself; `right`: whether its checkable answers are, at temperature 1 and greedy, None without any."""
    nll, nll_error = _nll([-pair.opponent_real_logps.sum(dtype=np.float64) for pair in pairs], pairs)
    metrics = {
        "real_nll_nats_per_token": nll, "real_nll_nats_per_token_se": nll_error,
        "generated_tokens": float(np.mean([len(pair.generated_ids) for pair in pairs])),
        "real_tokens": float(np.mean([len(pair.real_ids) for pair in pairs])),
        "truncated_share": float(np.mean([pair.finish_reason == "length" for pair in pairs])),
        **_share("same_as_real_share", np.array([np.array_equal(pair.generated_ids, pair.real_ids) for pair in pairs], float)),
    }
    if right is not None:
        metrics |= _share("exact_match_t1_share", right) | _share("exact_match_greedy_share", greedy_right)
    return metrics


def change(pairs: Sequence[Pair], first: Sequence[Pair], right: np.ndarray | None, first_right: np.ndarray | None) -> dict[str, float]:
    """What a version has gained since theta_0, prompt by prompt: a prompt that is hard for both adds nothing to the standard error.

    `pairs` and `first`: what both answered to the same prompts; `right`, `first_right`: whether their checkable answers are.
    """
    lost = [
        (then.opponent_real_logps.sum(dtype=np.float64) - now.opponent_real_logps.sum(dtype=np.float64))
        for now, then in zip(pairs, first, strict=True)
    ]
    nll, nll_error = _nll(lost, pairs)
    metrics = {"real_nll_change_nats_per_token": nll, "real_nll_change_nats_per_token_se": nll_error}
    if right is not None:
        won = right.astype(float) - first_right
        metrics |= {"exact_match_t1_change_share": float(won.mean()), "exact_match_t1_change_share_se": error_of_change(won)}
    return metrics


def error_of_change(won: np.ndarray) -> float:
    """Standard error of a mean of -1, 0 and 1, as if one prompt more had been won and one lost: few that differ say little."""
    return math.hypot(standard_error(won), math.sqrt(2) / len(won))


def _share(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_se": standard_error(values)}


def _nll(sums: Sequence[float], pairs: Sequence[Pair]) -> tuple[float, float]:
    """Nats per real token, over all tokens, and the standard error of that ratio; `sums`: nats of each answer."""
    nats, tokens = np.array(sums), np.array([len(pair.real_ids) for pair in pairs])
    ratio = nats.sum() / tokens.sum()
    return float(ratio), standard_error(nats - ratio * tokens) / float(tokens.mean())


def are_right(prompts: Sequence[Prompt], answers: Sequence[np.ndarray], decode: Callable[[np.ndarray], str]) -> np.ndarray | None:
    """Of the prompts that have a checkable answer, whether theirs is it, [num_checkable] bool; None if there are none."""
    checkable = [(prompt.answer, ids) for prompt, ids in zip(prompts, answers, strict=True) if prompt.answer is not None]
    return np.array([decode(ids).strip() == answer.strip() for answer, ids in checkable]) if checkable else None


def advantage(
    before: Sequence[Pair], real_logps: Sequence[np.ndarray], generated_logps: Sequence[np.ndarray],
    objective: PairObjective | LikelihoodObjective,
) -> dict[str, float]:
    """How well theta_{t+1} tells the real answers from those of theta_t. `before`: theta_t's pairs; the log-probs are theta_{t+1}'s.

    `advantage_accuracy` is the share of prompts with r(y) > r(y'), an equal one, such as y' that is y, counted half: 0.5 is chance.
    `advantage_nats` is the mean of r(y) - r(y'). Both with standard errors. With pairs to train on also the objective's loss here, less
    what it would be if nothing had been learnt.
    """
    now = [
        replace(pair, opponent_real_logps=real, opponent_generated_logps=generated)
        for pair, real, generated in zip(before, real_logps, generated_logps, strict=True)
    ]
    policy, opponent = (torch.tensor(np.array([opponent_reference(pair) for pair in pairs])) for pairs in (now, before))
    change = (policy - opponent).sum(-1).numpy()
    gained = change[:, 0] - change[:, 1]
    wins = (gained > 0) + 0.5 * (gained == 0)
    metrics = {
        "advantage_accuracy": float(wins.mean()), "advantage_accuracy_se": standard_error(wins),
        "advantage_nats": float(gained.mean()), "advantage_nats_se": standard_error(gained),
    }
    tokens = torch.tensor([[len(answer) for answer in pair.answers] for pair in before])
    losses = objective(PairLogps(policy, opponent, tokens))[1]
    if "pair_loss" in losses:
        metrics["advantage_loss_change"] = float((losses["pair_loss"] - losses["expected_pair_loss"]).mean())
    return metrics


COLLAPSED_SHARE, COLLAPSED_NATS = 0.5, 1.0
"""A run has collapsed whose last version has less than this share of the first one's right answers, or so many more nats per token."""


def has_collapsed(evaluations: Mapping[int, Mapping[str, float]]) -> bool:
    """Whether the last version of a run is far worse than its first; version -> metrics."""
    if not evaluations:
        return False
    first, last = evaluations[min(evaluations)], evaluations[max(evaluations)]
    rise = last.get("real_nll_nats_per_token", 0.0) - first.get("real_nll_nats_per_token", 0.0)
    lost = last.get("exact_match_t1_share", 1.0) < COLLAPSED_SHARE * first.get("exact_match_t1_share", 0.0)
    return not rise <= COLLAPSED_NATS or lost  # an NLL that is no number is one that exploded


def divergence(before: Sequence[Pair], generated_logps: Sequence[np.ndarray]) -> float:
    """Estimate of KL(p_before || p_now) in nats per token, from the earlier version's own answers; by chance it may be a little below 0."""
    drawn = np.concatenate([pair.opponent_generated_logps for pair in before])
    return float((drawn - np.concatenate(generated_logps)).mean()) if len(drawn) else 0.0


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; infinite of fewer than two."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
