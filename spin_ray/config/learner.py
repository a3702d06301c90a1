"""The main player: how it learns, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spin_ray.config.keys import Bounded, at_least, check_bounds, one_of, within
from spin_ray.errors import BadInput


@dataclass
class LearnerConfig(Bounded):
    COUNT = "num_workers"

    num_workers: Any = 1
    """Ray Train workers of the main player; {min: 1, max: 8}: as many of these as there is room for, one after the other if need be."""
    gpus_per_worker: int | None = at_least(0, None)
    """None: 1 when the cluster has GPUs, else 0."""
    cpus_per_worker: float = at_least(0, 0.5)
    label_selector: dict[str, str] = field(default_factory=dict)
    """Ray's labels of the nodes that workers may be on, as in `sampler.label_selector`."""
    batch_pairs: int = at_least(1, 64)
    """Pairs in one optimizer step, over all workers."""
    pack_tokens: int = at_least(1, 8192)
    """Token budget of one micro-batch; a longer single pair still gets a micro-batch of its own."""
    zero_stage: int = one_of(2, choices=(0, 1, 2, 3))
    """DeepSpeed ZeRO stage, 0 to 3."""
    optimizer: str = one_of("rmsprop", choices=("rmsprop", "adamw", "adamw_8bit"))
    """rmsprop (the paper's), adamw, or adamw with its moments in 8 bits, which needs the package bitsandbytes."""
    weight_decay: float = at_least(0, 0.0)
    warmup_fraction: float = within("[0, 1)", 0.1)
    """Share of an iteration's steps in which the learning rate rises; it then falls linearly to 0."""
    grad_clip: float = at_least(0, 1.0)
    """Largest global gradient norm; 0: no clipping."""
    checkpoint_every_steps: int = at_least(0, 0)
    """Save the main player's progress every so many optimizer steps of an iteration; 0: only at its end."""
    max_restarts: int = at_least(0, 3)
    """Restarts of the group of workers, after one of them died, that are put up with; one more stops the run."""
    activation_checkpointing: bool = False
    """Recompute the layers' activations in the backward pass."""
    share_prompt: bool = True
    """Compute the prompt of y and y', and what both begin with, once, where the attention backend can."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer states in the CPU's memory and step there; needs zero_stage 1, 2 or 3."""
    compile: bool = False
    """torch.compile the layers' norms and feed-forward blocks; the first steps take a minute longer."""

    def check(self) -> None:
        check_bounds("learner.num_workers", self.num_workers)
        if self.offload_optimizer and self.zero_stage == 0:
            raise BadInput("learner.offload_optimizer=True needs learner.zero_stage 1, 2 or 3 (here 0): only ZeRO moves states to the CPU")
        batch, workers = self.batch_pairs, self.most
        if self.is_elastic:
            self._check_elastic()
        elif batch % workers:
            raise BadInput(
                f"learner.batch_pairs={batch} does not divide by learner.num_workers={workers} "
                f"({batch} = {batch // workers} × {workers} + {batch % workers})"
            )

    def _check_elastic(self) -> None:
        if self.batch_pairs < self.most:
            raise BadInput(f"learner.batch_pairs={self.batch_pairs}: fewer pairs than learner.num_workers={self.num_workers} has workers")
        if self.optimizer == "adamw_8bit":
            raise BadInput(
                f"learner.num_workers={self.num_workers} does not go with learner.optimizer=adamw_8bit: its moments cannot be cut for "
                "another number of workers; give one number, or another optimizer"
            )
