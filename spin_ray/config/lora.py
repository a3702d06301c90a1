"""Low-rank adapters: theta is a base that never changes and an adapter that is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from spin_ray.config.keys import at_least, one_of
from spin_ray.errors import BadInput

MAX_RANK = 512
"""Of vLLM 0.32."""


@dataclass
class LoraConfig:
    rank: int = at_least(0, 0)
    """Rank of the adapter; 0: none, all weights are trained."""
    alpha: float = at_least(0, 0.0)
    """The adapter's part is multiplied by alpha / rank; 0: alpha is twice the rank."""
    target: list[str] = field(default_factory=list)
    """Last part of the names of the linear layers that are adapted, such as q_proj; empty: all of them but the output layer."""
    sync: str = one_of("adapter", choices=("adapter", "merged"))
    """What travels to the samplers: adapter (its weights alone), or merged (all weights, as without an adapter)."""
    export_merged: bool = True
    """Write every iteration's model merged, iter_00k/model, beside its adapter, iter_00k/adapter."""

    @property
    def scale(self) -> float:
        return self.alpha or 2.0 * self.rank

    def check(self) -> None:
        if self.rank > MAX_RANK and self.sync == "adapter":
            raise BadInput(f"lora.rank={self.rank}: the samplers' engine takes ranks up to {MAX_RANK}; or set lora.sync=merged")
        if self.rank and self.sync == "merged" and not self.export_merged:
            raise BadInput("lora.sync=merged needs lora.export_merged=true: a sampler that starts anew reads the merged model from disk")
