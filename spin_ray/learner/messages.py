"""What the driver tells the learner's workers to do, and what they answer. Plain frozen messages; every rank gets every command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spin_ray.errors import Diverged
from spin_ray.records import Pair, Saved, Version


@dataclass(frozen=True)
class Train:
    """Train on an iteration's pairs; answers with a `TrainReport`."""

    iteration: int
    block_sizes: tuple[int, ...]
    """Pairs in each block, in the order in which the first epoch reads them."""
    num_epochs: int
    num_steps: int
    """Optimizer steps, after which the iteration ends."""
    objective: Any
    """The loss of a pair, and what a batch divides by: one of losses.py."""
    lr: float
    """Peak learning rate."""
    scorer: str = "opponent"
    """Where the references come from: `reference.scorer`."""
    base: Saved | None = None
    """theta_0, where the objective asks for its references too."""
    wait_for_all: bool = False
    """Start when all blocks are there (`sequential`)."""
    snapshot: tuple[int, Version] | None = None
    """Publish the weights under this version after so many steps, for the opponent to play ahead with."""
    progress_path: str | None = None
    """Where `checkpoint_every_steps` puts the main player in the middle of the iteration, and where it is taken up."""
    is_a_try: bool = False
    """Where a number goes bad it ends, with fewer steps than it should have: the weights are given up afterwards anyway."""


@dataclass(frozen=True)
class Wish:
    """What a worker hears when it logs something."""

    end: bool = False
    """Save the progress and end: the user interrupts."""
    grow_in: int | None = None
    """Save the progress of this iteration's training and end: there is room for a larger group of workers, which goes on from it."""


@dataclass(frozen=True)
class Grouped:
    """What the driver hears when a group of workers begins whose number may change."""

    num_workers: int


@dataclass(frozen=True)
class StepRecord:
    """What the driver hears of each optimizer step."""

    iteration: int
    step: int
    total_steps: int
    metrics: dict[str, Any]
    """Means over the batch; a histogram is a list of shares."""
    group: int = 0
    """Which group of workers took the step, from 1 on."""


@dataclass(frozen=True)
class Divergence:
    """What the driver hears when a step's numbers are none; the workers wait for it to roll back, or to end the run."""

    group: int
    """Which group of workers it is whose weights are spoilt."""
    iteration: int
    step: int
    error: Diverged


@dataclass(frozen=True)
class Proved:
    """What the driver hears when the packed forward pass has been compared with plain transformers; see proof.py."""

    facts: str
    """What was compared and how far it differed, in words."""
    seconds: float


@dataclass(frozen=True)
class Saving:
    """What the driver hears when the saving of progress begins; its end is a Span."""


@dataclass(frozen=True)
class Count:
    """What an iteration's training has done so far."""

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    first_loss: float = float("nan")
    expected_first_loss: float | None = None
    rollbacks: int = 0
    """Those of the run before this training began: it is no use to a training that began after another one."""

    def after(self, metrics: dict[str, Any], num_pairs: int) -> Count:
        first = (self.first_loss, self.expected_first_loss) if self.steps else first_losses(metrics)
        return Count(self.steps + 1, self.pairs + num_pairs, self.tokens + int(metrics["num_tokens"]), *first, self.rollbacks)


def first_losses(metrics: dict[str, Any]) -> tuple[float, float | None]:
    """Of an iteration's first step: the loss without the NLL term, and what it must be where policy == opponent; None: anything."""
    return metrics.get("pair_loss", metrics["loss"]), metrics.get("expected_pair_loss")


@dataclass(frozen=True)
class TrainReport:
    num_steps: int
    num_pairs: int
    """Pairs trained on, epochs counted in."""
    num_tokens: int
    wall_s: float
    waited_s: float
    """Of wall_s, time without a finished block to train on."""
    first_loss: float
    """Mean l(z) of the first batch, before any step."""
    expected_first_loss: float | None
    """What that must be, because policy == opponent; None where there is no opponent."""
    peak_memory_gib: float


@dataclass(frozen=True)
class Score:
    """Compute the log-probs of the answers of these pairs; answers with two arrays per pair."""

    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Publish:
    """Put the weights into the object store; answers with PublishedWeights."""

    version: Version


@dataclass(frozen=True)
class Save:
    """Write the HF folder, the adapter's and the DeepSpeed checkpoint, each if it has a path; the caller commits them."""

    model_path: str | None
    checkpoint_path: str | None = None
    adapter_path: str | None = None


@dataclass(frozen=True)
class Restore:
    """Take up the weights of a DeepSpeed checkpoint again."""

    checkpoint_path: str


@dataclass(frozen=True)
class Rest:
    """Free the devices' memory, and wait until it is the main player's turn again; answers with the devices of all ranks."""


@dataclass(frozen=True)
class Stop:
    pass
