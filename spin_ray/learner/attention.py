"""Attention over a packed row, tree by tree, registered with transformers as the implementation "spin_packed".

The row does not travel through the model's keyword arguments, which some families do not hand on to their layers: every
module has a reference to one `CurrentRow`, which is told the row before the forward pass.

On CUDA in half precision rows go to torch's variable-length flash attention: in one call, or where trees have branches in two, the trunks
on themselves, and the branches on their trunks and themselves. (A third way, the branches on trunks and on themselves apart and then put
together by their log-sum-exp, has no gradient there.) Layers with sinks or a soft cap compute their scores in the open. Everything else
takes one scaled_dot_product_attention per tree: no work is spent on, and no memory taken by, pairs of tokens in different trees.

What a layer asks for and this file does not know is refused by name: an argument that is ignored gives wrong log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from spin_ray.errors import BadInput
from spin_ray.learner.packing import Packed, Tree

NAME = "spin_packed"
_SAYS_NOTHING = frozenset({
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
})
"""Arguments that layers hand on without a meaning for attention: what they say is in the row, or concerns the outputs."""
_SEE = "this model cannot be trained here; see docs/models.md"


class CurrentRow:
    """The packed row that a model is computing, from `begin` on until the next `begin`.

    A backward pass that computes layers again may come after another row's forward pass: the caller sets the row again then
    (`packed`). Knows which modules have called the attention below, so that a layer that went another way is noticed.
    """

    def __init__(self, lm: nn.Module):
        self._packed: Packed | None = None
        self._masks: dict[int | None, list[torch.Tensor | None]] = {}
        self._cut: Cut | None = None
        self._called: dict[int, int | None] = {}
        for module in lm.modules():
            module.spin_row = self

    @property
    def packed(self) -> Packed:
        assert self._packed is not None, "a forward pass in packed attention without a row"
        return self._packed

    @packed.setter
    def packed(self, packed: Packed) -> None:
        if packed is not self._packed:
            self._packed, self._masks, self._cut = packed, {}, None

    def begin(self, packed: Packed) -> None:
        self.packed = packed
        self._called.clear()

    def note(self, module: nn.Module) -> None:
        self._called[id(module)] = getattr(module, "layer_idx", None)

    def check_layers(self, num_layers: int) -> None:
        """Raises BadInput unless so many layers have called the attention below since `begin`."""
        if len(self._called) < num_layers:
            numbers = [k for k in range(num_layers) if k not in self._called.values()] if None not in self._called.values() else []
            which = f"layer {numbers[0]}" if numbers else f"{num_layers - len(self._called)} of {num_layers} layers"
            raise BadInput(f"the attention of {which} does not go through transformers' interface, so answers would see each other; {_SEE}")

    def masks(self, window: int | None) -> list[torch.Tensor | None]:
        """Every tree's mask, [length, length] bool, for layers that see `window` positions; None: causal. Made once per row."""
        if window not in self._masks:
            self._masks[window] = [_mask(tree, window, self.packed.position_ids) for tree in self.packed.trees]
        return self._masks[window]


    def cut(self) -> Cut:
        """The row in two calls. Made once per row."""
        if self._cut is None:
            self._cut = cut_in_two(self.packed.trees, self.packed.input_ids.device)
        return self._cut


def _mask(tree: Tree, window: int | None, position_ids: torch.Tensor) -> torch.Tensor | None:
    """[length, length] bool, True where the row's token may attend to the column's: causal, a branch sees only the trunk and itself, and
    nothing that lies `window` positions back or more. None where that is causal. A branch's positions go on from its trunk's last.
    """
    narrow = window is not None and tree.depth > window
    if not (tree.forks or narrow):
        return None
    mask = torch.ones(tree.length, tree.length, dtype=torch.bool, device=position_ids.device).tril()
    if tree.forks:
        lengths = torch.tensor([tree.trunk, *tree.branches], device=mask.device)
        branch = torch.repeat_interleave(torch.arange(len(lengths), device=mask.device), lengths)
        mask &= (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    if narrow:
        positions = position_ids[tree.start : tree.start + tree.length]
        mask &= positions[:, None] - positions[None, :] < window
    return mask


@dataclass(frozen=True)
class Pieces:
    """Tokens of a row as sequences of their own."""

    places: torch.Tensor
    """[sum of lengths] int64, in the row."""
    starts: torch.Tensor
    """[number + 1] int32, where each begins among `places`."""
    longest: int


@dataclass(frozen=True)
class Cut:
    """A row in two calls: trunks attend to themselves, branches to `seen`."""

    trunks: Pieces
    branches: Pieces
    seen: Pieces
    """For every branch its trunk, and then itself. In line at their ends with the branches, so that causal is what it is in the tree."""
    back: torch.Tensor
    """[T] int64: where each token of the row is among trunks and then branches."""


def cut_in_two(trees: Sequence[Tree], device: torch.device) -> Cut:
    """A tree that plain causal attention is enough for is one trunk."""
    trunks, branches, seen = [], [], []
    for tree in trees:
        if not tree.forks:
            trunks.append([(tree.start, tree.length)])
            continue
        trunk, place = (tree.start, tree.trunk), tree.start + tree.trunk
        trunks.append([trunk])
        for length in tree.branches:
            if length:
                branches.append([(place, length)])
                seen.append([trunk, (place, length)])
            place += length
    made = [_pieces(spans, device) for spans in (trunks, branches, seen)]
    return Cut(*made, back=torch.cat([made[0].places, made[1].places]).argsort())


def _pieces(sequences: list[list[tuple[int, int]]], device: torch.device) -> Pieces:
    """Each sequence as spans of the row, (start, length)."""
    places = [torch.arange(start, start + length) for spans in sequences for start, length in spans]
    lengths = [sum(length for _, length in spans) for spans in sequences]
    starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    return Pieces(torch.cat(places).to(device), starts.to(device), max(lengths))


def packed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: torch.Tensor | None = None, **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, num_heads, T, key_dim], key and value [1, num_kv_heads, T, key_dim or value_dim] -> [1, T, num_heads, value_dim].

    Called by transformers' attention layers. `s_aux` [num_heads]: a sink, a score that takes part in the softmax and has no
    value. `softcap` c: scores become c tanh(score / c). Raises BadInput for what it does not know.
    """
    row: CurrentRow = module.spin_row
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(module, {"attention_mask": attention_mask, "dropout": dropout or None, "is_causal": None if causal else False, **others})
    if key.shape[2] != len(row.packed.input_ids):
        raise BadInput(f"{type(module).__name__}: attends to {key.shape[2]} tokens of a row of {len(row.packed.input_ids)}; {_SEE}")
    row.note(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if s_aux is None and softcap is None and _has_kernel(query, value):
        return _by_kernel(query, key, value, row, scale, sliding_window), None
    lengths = [tree.length for tree in row.packed.trees]
    pieces = zip(row.masks(sliding_window), *(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    if s_aux is None and softcap is None:
        gqa = key.shape[1] != query.shape[1]
        outputs = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
            for mask, q, k, v in pieces
        ]
    else:
        outputs = [_in_the_open(q, k, v, mask, scale, softcap, s_aux) for mask, q, k, v in pieces]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _refuse(module: nn.Module, arguments: dict[str, Any]) -> None:
    unknown = [name for name, value in arguments.items() if value is not None and name not in _SAYS_NOTHING]
    if unknown:
        raise BadInput(f"{type(module).__name__}: packed attention does not know its {', '.join(sorted(unknown))}; {_SEE}")


def _in_the_open(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """One tree's attention with its scores [1, num_heads, length, length] in memory; softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    scores = scores.float().masked_fill(~mask, -torch.inf) if scores.dtype != torch.float64 else scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(1, scores.shape[1], scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(value.dtype) @ value


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] == value.shape[-1] <= 256


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: Pieces, seen: Pieces, scale: float, window: int | None
) -> torch.Tensor:
    """Sequences of their own, [T, heads, dim]: each attends to as many in `seen`, causal, in line at their ends."""
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if window is None or window > seen.longest else window - 1  # so many tokens before its own
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), own.starts, seen.starts, own.longest, seen.longest, scale=scale,
        window_size=(back, 0), enable_gqa=key.shape[1] != query.shape[1],
    )


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: CurrentRow, scale: float, window: int | None
) -> torch.Tensor:
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if not any(tree.forks for tree in row.packed.trees):
        whole = Pieces(row.packed.position_ids, row.packed.starts, max(tree.length for tree in row.packed.trees))
        return _varlen(query, key, value, whole, whole, scale, window)[None]
    cut = row.cut()
    trunks, branches, seen = cut.trunks.places, cut.branches.places, cut.seen.places
    on_themselves = _varlen(query[trunks], key[trunks], value[trunks], cut.trunks, cut.trunks, scale, window)
    on_both = _varlen(query[branches], key[seen], value[seen], cut.branches, cut.seen, scale, window)
    return torch.cat([on_themselves, on_both])[cut.back][None]


AttentionInterface.register(NAME, packed_attention)
