"""How much of the hardware a step uses: model FLOPs, the device's peak, memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spin_ray.learner.logps import body
from spin_ray.learner.packing import tree_lengths
from spin_ray.learner.quantized import true_shape
from spin_ray.records import Pair

PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12,
}
"""Dense bfloat16 FLOP/s by a part of the GPU's name, from NVIDIA's data sheets; the first name that is found counts."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward and backward pass that the model's mathematics need.

    A matmul with N weights costs 2 N per token forward and 4 N backward. So with `layers` the weights that a token meets in
    the linear layers below the output layer (of a mixture's experts those it is sent to), `head` = V × D and `width` =
    layers × heads × head size, a step of T row tokens and A answer tokens costs

        6 layers T  +  6 head A  +  12 width × (pairs of a token and a token that it attends to).

    Tokens of a trunk are in T once, in A once per answer: so many rows the output layer has (packing.py).
    A frozen weight has no gradient of its own: it counts for two thirds. What is computed again in the backward pass does not count:
    this is for MFU, not hardware utilisation.
    """

    layers: float
    head: float
    width: int

    @classmethod
    def of(cls, lm: nn.Module) -> ModelFlops:
        config = lm.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = sum(_weights_used(module, getattr(config, "num_experts_per_tok", None)) for module in body(lm).modules())
        width = config.num_hidden_layers * config.num_attention_heads * head_size
        head = lm.get_output_embeddings().weight
        return cls(layers, true_shape(head).numel() * _share(head), width)

    def step(self, pairs: Sequence[Pair], *, share_prompt: bool) -> float:
        """FLOPs of training on these pairs. Worked: layers 1, head 0, width 0, pair of 4 + 3 and 5 tokens, shared: 6 × 10 = 60."""
        total = 0
        for pair in pairs:
            total += 6 * self.head * sum(map(len, pair.answers))
            for trunk, branches in tree_lengths(pair, share_prompt=share_prompt):
                attended = trunk * (trunk + 1) / 2 + sum(n * (trunk + (n + 1) / 2) for n in branches)
                total += 6 * self.layers * (trunk + sum(branches)) + 12 * self.width * attended
        return total


def _weights_used(module: nn.Module, experts_per_token: int | None) -> float:
    """Weights of this module alone that a token is multiplied with: a matrix, or the share of experts stacked in three dimensions."""
    if isinstance(module, nn.Embedding):
        return 0
    own = [(_share(p), true_shape(p)) for p in dict(module.named_parameters(recurse=False)).values()]
    experts = sum(share * (shape.numel() * (experts_per_token or shape[0]) // shape[0]) for share, shape in own if len(shape) == 3)
    return experts + sum(share * shape.numel() for share, shape in own if len(shape) == 2)


def _share(parameter: nn.Parameter) -> float:
    return 1 if parameter.requires_grad else 2 / 3


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against: a GPU's data sheet, or the fastest of a few matmuls on this device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if dtype == torch.bfloat16 and (known := next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)):
            return known
    size = 8192 if device.type == "cuda" else 1024
    matrix, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_gib()


def peak_resident_gib() -> float:
    """Peak resident memory of this process. Not getrusage's: a process inherits that from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def forget_peak() -> None:
    """From now on the peak is that of what is still to come."""
    Path("/proc/self/clear_refs").write_text("5")


def row_use(plan: list[list[list[int]]], lengths: Sequence[int], *, pack_tokens: int) -> dict[str, Any]:
    """How well a plan of micro-batches uses its rows: rows have no padding, but a rank without pairs computes one for nothing.

    `padding_share`: tokens computed for nothing, of all tokens computed. `pack_fill`: tokens of a row over `pack_tokens`, on average.
    """
    rows = [[lengths[i] for i in micro] for rank in plan for micro in rank]
    useful, wasted = sum(map(sum, rows)), min(lengths) * sum(not row for row in rows)
    return {"padding_share": wasted / (useful + wasted), "pack_fill": useful / (pack_tokens * sum(bool(row) for row in rows))}
