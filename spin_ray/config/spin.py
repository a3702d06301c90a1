"""The methods: SPIN's iterations (arXiv 2401.01335, Algorithm 1), and the SFT that it starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from spin_ray.config.keys import at_least, one_of
from spin_ray.errors import BadInput


@dataclass
class SpinConfig:
    num_iterations: int = at_least(1, 4)
    """T of Algorithm 1."""
    num_epochs: int = at_least(1, 2)
    """Passes over the pairs of an iteration."""
    beta: Any = 0.1
    """The paper's lambda: scale of the log-ratio margin; one value, or one per iteration."""
    lr: Any = 5e-7
    """Peak learning rate; one value, or one per iteration."""
    replay: bool = True
    """From iteration 1 on also train on the pairs of the iteration before, re-scored by the present opponent (paper, section 6.1)."""
    loss: str = one_of("logistic", choices=("logistic", "hinge", "exponential", "correlation"))
    """The paper's l: logistic, hinge, exponential or correlation."""
    nll_weight: float = at_least(0, 0.0)
    """Weight of an added negative log-likelihood of y, per token (Iterative RPO, arXiv 2404.19733); 0 is the paper."""

    def check(self) -> None:
        _check_schedule("spin.beta", self.beta, self.num_iterations)
        _check_schedule("spin.lr", self.lr, self.num_iterations)


@dataclass
class SftConfig:
    """Only for the command `sft`."""

    num_epochs: int = at_least(1, 1)
    lr: float = 2e-5

    def check(self) -> None:
        if self.lr <= 0:
            raise BadInput(f"sft.lr={self.lr}: must be a positive number")


def _check_schedule(key: str, value: Any, num_iterations: int) -> None:
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, list) and len(value) != num_iterations:
        raise BadInput(f"{key} has {len(value)} values for spin.num_iterations={num_iterations}; give one value, or one per iteration")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number <= 0:
            raise BadInput(f"{key}={value}: must be a positive number, or a list of them")
