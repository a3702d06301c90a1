"""What the driver asks of a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from spin_ray.records import Pair, Prompt

if TYPE_CHECKING:
    from spin_ray.losses import LikelihoodObjective, PairObjective


class Method(Protocol):
    """Iterations are numbered from 0; theta_t is what iteration t starts from."""

    num_iterations: int
    plays: bool
    """Whether theta_t answers every prompt, and its answers are the generated ones. If not, `pair` makes the pairs."""
    anchored: bool
    """Whether pairs also carry what theta_0 answered."""
    scorer: str
    """Who computes the references, as in `reference.scorer`."""

    def replayed(self, t: int) -> range:
        """Earlier iterations whose pairs are trained on again in iteration t, the latest first."""

    def needed(self, t: int) -> set[int]:
        """Earlier iterations whose pairs iteration t reads."""

    def pair(self, prompt: Prompt) -> Pair:
        """The pair that a row is, where nothing is played."""

    def mixes_in_base(self, t: int) -> bool:
        """Whether iteration t's objective asks for theta_0's references too, which differ from theta_t's."""

    def objective(self, t: int) -> PairObjective | LikelihoodObjective: ...

    def lr(self, t: int) -> float:
        """Peak learning rate of iteration t."""

    def num_epochs(self, t: int) -> int: ...
