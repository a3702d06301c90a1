"""How new weights get from the learner to the samplers."""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.config.keys import at_least, one_of

DEVICES = {"object_store": "", "nccl": "GPU", "gloo": "CPU"}
"""Transport -> where both players must compute for it; empty: anywhere."""


@dataclass
class WeightsConfig:
    transport: str = one_of("object_store", choices=tuple(DEVICES))
    """object_store: Ray's, which brings them to each host once; nccl: from a GPU of the learner's straight into those of every replica
    (vLLM's weight transfer); gloo: the same over torch's gloo, for CPUs. Where a transfer fails, the object store takes its place."""
    timeout_s: float = at_least(1, 300.0)
    """nccl, gloo: seconds after which a transfer to a replica counts as failed."""
    bucket_timeout_s: float = at_least(1, 60.0)
    """object_store: seconds without one more bucket (256 MiB) from the learner's host, after which a replica reads the weights in the run
    directory, as soon as they are there."""
