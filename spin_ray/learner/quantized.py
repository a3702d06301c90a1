"""What is kept in few bits: weights in 4 (below), an optimizer's moments in 8 (Dettmers et al., arXiv 2110.02861).

Weights in 4 bits (NF4, by bitsandbytes; Dettmers et al., arXiv 2305.14314): a base, under an adapter that is trained.

Statistics are kept as they are, half a bit per weight. So to quantise what 4 bits stand for changes nothing: the largest value of a
block of 64 stays what it is, and every other one is a step of the code times that. With statistics compressed once more that would
not hold.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None  # whoever sets a key that needs it has been refused


def quantize(lm: PreTrainedModel, layers: Iterable[str], device: torch.device) -> None:
    """Put linear layers, by their names, into 4 bits, one after the other; they move to the device."""
    for name in layers:
        parent, _, last = name.rpartition(".")
        plain = getattr(lm.get_submodule(parent), last)
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=plain.bias is not None, compute_dtype=plain.weight.dtype, quant_type="nf4",
                compress_statistics=False,
            )
        layer.weight = _in_4_bits(plain.weight.data, layer)
        layer.bias = plain.bias
        layer.support_avx512bf16_for_cpu = False  # its kernel computes in bfloat16, whatever it is asked for
        setattr(lm.get_submodule(parent), last, layer.to(device))
    lm.is_loaded_in_4bit = True  # peft asks


def _in_4_bits(weight: torch.Tensor, layer: torch.nn.Module) -> torch.nn.Parameter:
    return bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer)


def adamw_8bit(parameters: Iterable[torch.nn.Parameter], *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that keeps two bytes per parameter instead of eight, in blocks of 256; tensors of less than 4,096 stay in 32 bits."""
    return bnb.optim.AdamW8bit(parameters, lr=0.0, weight_decay=weight_decay)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """What a weight stands for, without its gradient: itself, but for one in 4 bits."""
    state = getattr(tensor, "quant_state", None)
    return tensor.detach() if state is None else bnb.functional.dequantize_4bit(tensor.data, state)


def true_shape(tensor: torch.Tensor) -> torch.Size:
    """Of what a weight stands for, whole: also of one in 4 bits, or in DeepSpeed's shards."""
    state = getattr(tensor, "quant_state", None)
    return getattr(tensor, "ds_shape", tensor.shape) if state is None else state.shape


def blank(tensor: torch.Tensor) -> torch.Tensor:
    """What a weight stands for, whole, without its values: on torch's meta device."""
    state = getattr(tensor, "quant_state", None)
    return torch.empty(true_shape(tensor), dtype=tensor.dtype if state is None else state.dtype, device="meta")
