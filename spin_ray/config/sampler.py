"""The opponent: how it answers, on what, and when a replica counts as lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spin_ray.config.keys import Bounded, at_least, check_bounds, per_iteration, within


@dataclass
class SamplerConfig(Bounded):
    COUNT = "num_replicas"

    num_replicas: Any = 1
    """Opponent sampler actors, each with an engine of its own; {min: 1, max: 8}: as many of these as keep the learner from waiting."""
    tensor_parallel_size: int = at_least(1, 1)
    """GPUs that share one replica's model."""
    gpus_per_replica: int | None = at_least(0, None)
    """None: tensor_parallel_size when the cluster has GPUs, else 0."""
    cpus_per_replica: float = at_least(0, 0.5)
    label_selector: dict[str, str] = field(default_factory=dict)
    """Ray's labels of nodes that replicas may be on: {pool: a100}; also `!a100`, `in(a100,h100)`, `!in(...)`. Empty: any node."""
    temperature: Any = per_iteration(1.0, least=0)
    """At which the opponent's answers are drawn, 0: greedy; one value, or one per iteration."""
    top_p: float = within("(0, 1]", 1.0)
    max_new_tokens: int = at_least(1, 256)
    """Longest generated answer, in tokens."""
    block_prompts: int = at_least(1, 64)
    """Prompts in one block: the unit of work, of durability and of streaming."""
    max_num_seqs: int = at_least(1, 256)
    """Answers that one engine writes at the same time."""
    request_timeout_s: float = at_least(1, 1800.0)
    """Seconds after which a replica that still owes an answer counts as hanging, and is started anew."""
    heartbeat_timeout_s: float = at_least(0, 300.0)
    """Seconds without a sign of life of a replica that owes answers, or that its engine is at one step, after which it counts as
    hanging; 0: only `request_timeout_s` tells."""
    max_restarts: int = at_least(0, 5)
    """Restarts of replicas that are put up with within `restart_window_s`; one more stops the run with the first error."""
    restart_window_s: float = at_least(0, 600.0)
    gpu_memory_utilization: float | None = within("(0, 1]", None)
    """Share of a GPU's memory for the engine. None: 0.9, or with placement.mode=shared what a learner that rests leaves, if less."""

    def check(self) -> None:
        check_bounds("sampler.num_replicas", self.num_replicas)
