"""When a run has nothing more to gain, and which of its versions is the best. Pure functions of held-out numbers.

| `spin.stop` | the run ends when |
|---|---|
| never | all iterations are played |
| equilibrium | the held-out advantage has vanished: theta_{t+1} tells y from y' in `spin.stop_accuracy` of cases, two errors added |
| worse | by two standard errors, the held-out metric is worse than the best version's by more than `spin.stop_margin` |
| either | one of them |

The metric is the share of right answers where the held-out data can be checked, else the negative log-likelihood of the real ones.
Versions are compared prompt by prompt, so what is hard for all of them is not taken for a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spin_ray.config import SpinConfig
from spin_ray.heldout import error_of_change, standard_error

NUM_ERRORS = 2.0
"""Standard errors that a difference must exceed."""


@dataclass(frozen=True)
class Standing:
    """A version's held-out numbers, prompt by prompt."""

    version: int
    nll: np.ndarray
    """[N], of each real answer, in nats per token of the average answer: the mean is the NLL per token."""
    right: np.ndarray | None = None
    """[number of checkable prompts] bool."""
    accuracy: tuple[float, float] | None = None
    """Of telling y from the version before's y', and its standard error; None for the first version."""

    @property
    def score(self) -> np.ndarray:
        """[N], more is better."""
        return -self.nll if self.right is None else self.right.astype(float)


@dataclass(frozen=True)
class Verdict:
    best: int
    """The version to take."""
    reason: str = ""
    """Why the run should end; empty: go on."""


def judge(history: Sequence[Standing], spin: SpinConfig) -> Verdict:
    """The best of the versions so far, and whether the latest is one too many. `history`: from version 0 on."""
    best = max(history, key=lambda standing: (standing.score.mean(), -standing.version))
    latest, why = history[-1], []
    if spin.stop in ("equilibrium", "either") and latest.accuracy:
        accuracy, error = latest.accuracy
        if accuracy + NUM_ERRORS * error <= spin.stop_accuracy:
            why.append(
                f"theta_{latest.version} tells the real answers to held-out prompts from those of theta_{latest.version - 1} in "
                f"{accuracy:.3f} of cases (± {error:.3f}, chance is 0.5, spin.stop_accuracy={spin.stop_accuracy:g}): "
                "there is nothing left to learn from them"
            )
    if spin.stop in ("worse", "either"):
        lost, error = best.score - latest.score, _error_of_difference(best, latest)
        if lost.mean() - NUM_ERRORS * error > spin.stop_margin:
            what = "held-out NLL is {:.3f} nats per token" if latest.right is None else "share of right held-out answers is {:.3f}"
            value, at_best = (abs(standing.score.mean()) for standing in (latest, best))
            why.append(
                f"theta_{latest.version}'s {what.format(value)}, theta_{best.version}'s {at_best:.3f} (difference {lost.mean():.3f} ± "
                f"{error:.3f}, spin.stop_margin={spin.stop_margin:g}): it gets worse"
            )
    return Verdict(best.version, "; ".join(why))


def _error_of_difference(best: Standing, latest: Standing) -> float:
    """Standard error of the mean difference."""
    lost = best.score - latest.score
    return standard_error(lost) if latest.right is None else error_of_change(lost)
