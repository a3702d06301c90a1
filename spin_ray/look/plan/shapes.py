"""A model's size from its config alone: how many weights it has, what of it is trained, what a row leaves behind. Nothing is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spin_ray.config import LoraConfig
from spin_ray.errors import BadInput, in_one_line
from spin_ray.families import auto_class, text_part
from spin_ray.learner.adapter import linear_layers, put_into_blank
from spin_ray.learner.logps import body
from spin_ray.learner.modes import layers_of
from spin_ray.look.plan.activations import COUNTED, Activations, Row, count
from spin_ray.look.plan.sizes import Model


@dataclass(frozen=True)
class Shapes:
    """A model's sizes under one way to train it."""

    model: Model
    kv_heads: int
    head_size: int
    num_layers: int
    width: int
    vocabulary: int
    weights_per_token: float
    """That a token is multiplied with below the output layer: of a mixture's experts those that it is sent to."""
    file_bytes: int
    """Of the folder's weights; 0 where there are none."""
    _blank: Callable[[str], nn.Module]
    """Makes the model without values, in a dtype."""
    _dtype: str

    def activations(self, row: Row, *, on_gpu: bool) -> tuple[Activations, bool]:
        """Of one row, and whether they were counted as they are.

        Where a family's code needs values they are not: experts in float32 are taken for twice those in bfloat16, which are computed in
        one product; else they are reckoned from the layers' matrices.
        """
        for dtype in dict.fromkeys((self._dtype, "bfloat16")):
            with contextlib.suppress(RuntimeError):
                counted = count(self._blank(dtype), row, on_gpu=on_gpu)
                return (counted, True) if dtype == self._dtype else (_twice(counted), False)
        return _reckoned(self._blank(self._dtype), row), False

    def kv_bytes(self, weight_bytes: int) -> int:
        """Of the sampler's cache, for one token."""
        return 2 * self.num_layers * self.kv_heads * self.head_size * weight_bytes


def read_shapes(path: str, config: Any, lora: LoraConfig, *, dtype: str, in_4_bits: bool) -> Shapes:
    """`config`: transformers' own of the model at `path`. Raises BadInput where the model cannot be made from it."""

    def plain(dtype: str) -> nn.Module:
        with torch.device("meta"):
            return auto_class(config).from_config(config, attn_implementation=COUNTED, dtype=getattr(torch, dtype))

    def blank(dtype: str) -> nn.Module:
        lm = plain(dtype)
        trained = {id(p) for part in (body(lm), lm.get_output_embeddings()) for p in part.parameters()}
        for parameter in lm.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if lora.rank:
            put_into_blank(lm, lora)
        return lm

    try:
        lm = blank(dtype)
        matrices = [num_in * num_out for num_in, num_out in linear_layers(plain(dtype)).values()] if in_4_bits else []
    except (ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise BadInput(f"model.path={path}: transformers makes no model of this config: {in_one_line(error)[:200]}") from error
    return _shapes(lm, config, path, matrices, blank, dtype)


def _shapes(lm: nn.Module, config: Any, path: str, in_4_bits: list[int], blank: Callable[[str], nn.Module], dtype: str) -> Shapes:
    """`in_4_bits`: weights of each matrix that is held so."""
    text, head = text_part(config), lm.get_output_embeddings().weight
    trained = [parameter.numel() for parameter in lm.parameters() if parameter.requires_grad]
    model = Model(
        total=sum(parameter.numel() for parameter in lm.parameters()), trained=sum(trained), largest=max(trained),
        layer=max(map(_numel, layers_of(body(lm))), default=0), head=head.numel(), head_is_trained=head.requires_grad,
    )
    if in_4_bits:
        model = replace(model, in_4_bits=sum(in_4_bits), largest=max(in_4_bits))
    heads = text.num_attention_heads
    return Shapes(
        model, kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads, num_layers=text.num_hidden_layers,
        width=head.shape[1], vocabulary=head.shape[0], weights_per_token=_per_token(lm, text),
        file_bytes=sum(file.stat().st_size for file in Path(path).glob("*.safetensors")), _blank=blank, _dtype=dtype,
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _per_token(lm: nn.Module, text: Any) -> float:
    chosen, found = getattr(text, "num_experts_per_tok", None), 0.0
    for module in body(lm).modules():
        if not isinstance(module, nn.Embedding):
            for parameter in dict(module.named_parameters(recurse=False)).values():
                experts = parameter.shape[0] if parameter.dim() == 3 else 1
                found += parameter.numel() * min(chosen or experts, experts) / experts if parameter.dim() > 1 else 0
    return found


def _twice(counted: Activations) -> Activations:
    return Activations(*(2 * value for value in astuple(counted)))


def _reckoned(lm: nn.Module, row: Row) -> Activations:
    """Every matrix keeps its input and its output, a norm as much as its input."""
    size, tokens, width = lm.dtype.itemsize, row.tokens, lm.get_output_embeddings().weight.shape[1]
    matrices = [[sum(m.weight.shape) for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))] for layer in layers_of(body(lm))]
    layers = [(sum(each) + 4 * width) * tokens * size for each in matrices]
    widest = max((max(each, default=0) for each in matrices), default=0) * tokens * size
    return Activations(sum(layers), max(layers, default=0), len(layers) * width * tokens * size, 3 * width * tokens * size, widest)
