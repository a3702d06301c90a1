"""The methods: SPIN's iterations (arXiv 2401.01335, Algorithm 1), the SFT that it starts from, and DPO on preference rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spin_ray.config.keys import at_least, one_of, per_iteration, within
from spin_ray.errors import BadInput


@dataclass
class PairLossConfig:
    """What is trained on pairs, whoever wrote the second answer; losses.py has the formulas, docs/losses.md what each is for."""

    beta: Any = per_iteration(0.1, above=0)
    """The paper's lambda: scale of the log-ratio margin; one value, or one per iteration."""
    lr: Any = per_iteration(5e-7, above=0)
    """Peak learning rate; one value, or one per iteration."""
    num_epochs: Any = per_iteration(2, least=1, whole=True)
    """Passes over the pairs of an iteration; one value, or one per iteration."""
    loss: str = one_of("logistic", choices=("logistic", "hinge", "exponential", "correlation", "space", "triplet"))
    """The paper's l: logistic, hinge, exponential or correlation; or space (SPACE), or triplet (T-SPIN)."""
    nll_weight: Any = per_iteration(0.0, least=0)
    """Weight of an added negative log-likelihood of y, per token (Iterative RPO, arXiv 2404.19733); 0 is the paper. One value, or one
    per iteration."""
    label_smoothing: float = within("[0, 0.5)", 0.0)
    """Share of the loss that takes y' for the real answer; 0 is the paper."""
    length: str = one_of("sum", choices=("sum", "mean", "desensitised"))
    """How an answer's log-prob is measured: sum over its tokens (the paper), mean, or desensitised (LD-DPO, arXiv 2409.06411)."""
    tail_weight: float = within("[0, 1]", 0.5)
    """With length=desensitised: weight of the tokens past the length of the shorter answer."""
    positive_weight: float = at_least(0, 0.0)
    """Weight of the fall of log p(y) in the margin (DPO-positive, arXiv 2402.13228); 0 is the paper."""
    noise_ratio: float = within("(0, inf)", 1.0)
    """With loss=space: its mu."""

    def check_losses(self, section: str) -> None:
        if self.loss in ("space", "triplet"):
            self.refuse(section, ("label_smoothing", "positive_weight"), "is no function of the margin alone")

    def refuse(self, section: str, keys: tuple[str, ...], why: str) -> None:
        """Raise BadInput for a key that is set and means nothing beside this loss."""
        for key in keys:
            if value := getattr(self, key):
                raise BadInput(f"{section}.{key}={value}: {section}.loss={self.loss} {why}; give 0 or another loss")


@dataclass
class SpinConfig(PairLossConfig):
    num_iterations: int = at_least(1, 4)
    """T of Algorithm 1."""
    replay: int = at_least(0, 1)
    """Also train on the pairs of so many earlier iterations, re-scored by the present opponent: 1 is the paper (section 6.1), 0 none,
    more is fictitious play (arXiv 2404.04291)."""
    replay_weight: float = within("(0, 1]", 1.0)
    """What a pair counts for each iteration that it is old."""
    base_share: float = within("[0, 1]", 0.0)
    """Share of theta_0 in the reference, a geometric mixture with theta_t (alpha-SPIN, arXiv 2404.04291); 0 is the paper."""
    anchor_weight: float = at_least(0, 1.0)
    """With loss=triplet: weight of the advantage of y' over what theta_0 answered (T-SPIN, arXiv 2601.08198)."""
    stop: str = one_of("never", choices=("never", "equilibrium", "worse", "either"))
    """When to end before num_iterations: never; at equilibrium, when held-out advantage has vanished; when the held-out metric gets worse;
    or at either. Needs data.eval; stop.py has the rules."""
    stop_accuracy: float = within("[0.5, 1]", 0.6)
    """With stop=equilibrium: held-out advantage that counts as vanished, as a share of prompts; 0.5 is chance."""
    stop_margin: float = at_least(0, 0.0)
    """With stop=worse: how much worse than the best version's the metric may be beyond its standard error; nats per token, or a share."""

    def check(self) -> None:
        self.check_losses("spin")
        if self.loss == "triplet":
            self.refuse("spin", ("base_share",), "has no reference")
        if self.loss == "space":
            self.refuse("spin", ("base_share",), "takes each answer alone, and the mixture is known but for a factor per prompt")


@dataclass
class DpoConfig(PairLossConfig):
    """With method=dpo: one training on given preference rows against theta_0."""

    num_epochs: Any = per_iteration(1, least=1, whole=True)

    def check(self) -> None:
        self.check_losses("dpo")
        if self.loss == "triplet":
            raise BadInput("dpo.loss=triplet: there is no third answer in a preference row; choose another loss")


@dataclass
class SftConfig:
    """With method=sft, or the command `sft`."""

    num_epochs: Any = per_iteration(1, least=1, whole=True)
    """Passes over the rows."""
    lr: Any = per_iteration(2e-5, above=0)
    """Peak learning rate."""
