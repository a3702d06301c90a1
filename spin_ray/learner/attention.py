"""Attention over a packed row, tree by tree, registered with transformers as the implementation "spin_packed".

On CUDA in half precision, trees without a mask go to torch's variable-length flash attention in one call. Everything
else takes one scaled_dot_product_attention per tree: no work is spent on, and no memory taken by, pairs of tokens in
different trees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from spin_ray.learner.packing import Packed

NAME = "spin_packed"


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    *, packed: Packed, scaling: float, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, num_heads, T, head_dim], key and value [1, num_kv_heads, T, head_dim] -> [1, T, num_heads, head_dim].

    Called by transformers' attention layers; `packed` reaches it through the model's keyword arguments.
    Raises ValueError where a tree is longer than the layer's sliding window: such a row would need another mask.
    """
    longest = max(tree.length for tree in packed.trees)
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(f"a prompt with its answers has {longest} tokens, more than this model's sliding window of {sliding_window}")
    if _one_call(query, packed):
        return _varlen(query, key, value, packed, scaling, longest), None
    lengths = [tree.length for tree in packed.trees]
    pieces = zip(packed.trees, *(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=tree.mask, is_causal=tree.mask is None, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        for tree, q, k, v in pieces
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _one_call(query: torch.Tensor, packed: Packed) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and all(tree.mask is None for tree in packed.trees)


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed, scaling: float, longest: int) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    out = varlen_attn(
        *flat, packed.starts, packed.starts, longest, longest, scale=scaling, window_size=(-1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out[None]


AttentionInterface.register(NAME, packed_attention)
