"""What a plan of memory is made from and made of: a model's size, how the learner is set up, a row's work; parts in bytes."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """One line of the sum."""

    name: str
    num_bytes: float
    formula: str
    """With its numbers."""


@dataclass(frozen=True)
class Model:
    """What the learner must know of a model's size; weights are counted, not bytes."""

    total: int
    trained: int
    in_4_bits: int = 0
    largest: int = 0
    """The largest tensor that is trained."""
    layer: int = 0
    """The largest layer."""
    head: int = 0
    """Vocabulary × width: the output layer."""
    head_is_trained: bool = True


@dataclass(frozen=True)
class Layout:
    """How the learner is set up."""

    on_gpu: bool
    weight_bytes: int
    """4: float32; 2: bfloat16, with master weights in float32."""
    workers: int = 1
    zero_stage: int = 2
    optimizer: str = "rmsprop"
    offload: bool = False
    copies: int = 0
    """Frozen copies of what is trained (reference.scorer=frozen, and theta_0's)."""
    recompute: bool = False
    """Activation checkpointing."""
    published: int = 0
    """Weights that a process on a CPU has put into the object store by the time of its later steps."""

    @property
    def shards(self) -> int:
        """Ranks that share master weights and moments."""
        return self.workers if self.zero_stage else 1


@dataclass(frozen=True)
class Work:
    """One row of a step, in bytes (activations.py), and how many a rank has in a step."""

    layers: float
    largest_layer: float
    layer_inputs: float
    around: float
    widest: float
    logits: float
    """The chunk that the output layer holds, in float32."""
    rows_per_step: float = 2.0


def count(number: float) -> str:
    """Worked: 134515008 -> 134.5M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:g}"


def size(num_bytes: float) -> str:
    """Worked: 3 * 2**30 -> 3.00 GiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
