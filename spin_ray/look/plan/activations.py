"""What a forward pass keeps for its backward pass, counted on torch's meta device: no weights, no memory, any family.

The model is made there as transformers makes it, computes one packed row, and every tensor that autograd saves is counted, each memory
once. Attention is a stand-in that keeps what attention.py's would keep; all else is the family's own code.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from spin_ray.learner.logps import body
from spin_ray.learner.modes import layers_of, quieten

COUNTED = "spin_counted"


@dataclass(frozen=True)
class Row:
    """A packed row as its attention sees it: so many trees of one size."""

    trees: float
    trunk: float
    """Tokens of a prompt."""
    branches: tuple[float, ...]
    """Tokens of the answers of one pair."""

    @property
    def tree_tokens(self) -> float:
        return self.trunk + sum(self.branches)

    @property
    def tokens(self) -> int:
        return max(1, round(self.trees * self.tree_tokens))

    @property
    def answer_tokens(self) -> int:
        return max(1, round(self.trees * sum(self.branches)))


@dataclass(frozen=True)
class Activations:
    """Bytes that one row leaves behind in the forward pass."""

    layers: int
    """In all layers together."""
    largest_layer: int
    layer_inputs: int
    """What enters the layers: all that stays of them where activations are computed again."""
    around: int
    """Outside of the layers, and in the output layer."""
    widest: int
    """The largest single tensor of a layer."""


class _Counter:
    """Bytes of saved tensors by the layer that saved them; weights are no activations."""

    def __init__(self, lm: nn.Module):
        self._known = {parameter.untyped_storage()._cdata for parameter in lm.parameters()}
        self._alive: list[torch.UntypedStorage] = []
        self._layer: int | None = None
        self.bytes: Counter[int | None] = Counter()
        self.inputs = self.widest = 0
        self._layers = list(layers_of(body(lm)))
        for number, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(lambda _, args, kwargs, number=number: self._enter(number, args, kwargs), with_kwargs=True)
            layer.register_forward_hook(lambda *_: self._leave())

    def _enter(self, number: int, args: Any, kwargs: Any) -> None:
        self._layer = number
        hidden = args[0] if args else kwargs["hidden_states"]
        self.inputs += hidden.numel() * hidden.element_size()

    def _leave(self) -> None:
        self._layer = None

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(storage)  # else its number could be another's
            self.bytes[self._layer] += storage.nbytes()
            if self._layer is not None:
                self.widest = max(self.widest, storage.nbytes())
        return tensor


def count(lm: nn.Module, row: Row, *, on_gpu: bool) -> Activations:
    """Of one row through a model on the meta device, made with the attention COUNTED. Raises RuntimeError where its code needs values."""
    quieten(lm)
    counter, tokens = _Counter(lm), row.tokens
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    for module in lm.modules():  # not all families hand arguments on to their attention
        module.counted_row = (row, on_gpu)
    with torch.autograd.graph.saved_tensors_hooks(counter.save, lambda tensor: tensor):
        hidden = body(lm)(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
    layers = [size for number, size in counter.bytes.items() if number is not None]
    head = 3 * row.answer_tokens * hidden.shape[-1] * hidden.element_size()  # hidden, its unit gradients, and what scales them
    return Activations(sum(layers), max(layers, default=0), counter.inputs, counter.bytes[None] + head, counter.widest)


class _Keeps(torch.autograd.Function):
    """Attention that computes nothing: its output has a memory of its own, and `kept` stays until the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, kept)
        return value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> None:
        raise NotImplementedError


def _counted_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *,
    softcap: float | None = None, s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:
    row, on_gpu = module.counted_row
    in_the_open = softcap is not None or s_aux is not None
    kept = _kept(row, query, key, value, on_gpu=on_gpu, in_the_open=in_the_open)
    return _Keeps.apply(query, key, value, torch.empty(kept, dtype=torch.uint8, device="meta")), None


def _kept(row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, on_gpu: bool, in_the_open: bool) -> int:
    """Bytes that attention keeps beside query, key, value and what it returns."""
    size, heads, tokens = query.element_size(), query.shape[1], query.shape[2]
    output = tokens * heads * value.shape[3] * size
    scores = round(row.trees * row.tree_tokens**2)
    if in_the_open:  # capped, masked in float32, softmax, and the same in the weights' dtype
        return output + scores * heads * (8 + 2 * size)
    log_sums = tokens * heads * 4
    if on_gpu and query.element_size() == 2:  # copies of query and output, and keys and values once per branch that sees them
        seen = row.trees * (2 * row.trunk + sum(row.branches) + len(row.branches) * row.trunk) / max(1, row.tokens)
        per_token = (key.shape[1] * (key.shape[3] + value.shape[3])) * size
        return round(2 * output + log_sums + seen * tokens * per_token)
    return output + log_sums + scores * size  # a mask of bool becomes one of numbers, in every layer


AttentionInterface.register(COUNTED, _counted_attention)
