"""How a model's modules are set: no noise in what it computes; activations kept, or computed again in the backward pass."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_DROPS = re.compile("drop")
"""In the names of numbers that are only looked at while training: dropout, resid_pdrop, layerdrop."""


def quieten(lm: nn.Module) -> None:
    """No dropout, layer drop or router jitter, in scores and in training: SPIN compares a log-prob with the same model's own.

    Evaluation mode does most of it, also where the config is read in the forward pass. But layers that compute their activations
    again are in training mode (`checkpoint_activations`), so their probabilities become 0 as well; what is inside a layer is never in
    it. Router jitter stays a number: Phi-MoE's routing needs it in evaluation too. The config stays as it was.
    """
    lm.eval()
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _DROPS.search(name) and isinstance(value, float):
                setattr(module, name, 0.0)


def checkpoint_activations(lm: nn.Module, on: bool) -> None:
    """Whether layers compute their activations again in the next backward pass. `gradient_checkpointing_enable` must have been called.

    transformers does it in training mode only: so such a layer is in it, and what is inside the layer is not.
    """
    for layer in layers_of(lm):
        if hasattr(layer, "_gradient_checkpointing_func"):
            layer.gradient_checkpointing = layer.training = on


def layers_of(lm: nn.Module) -> Iterator[nn.Module]:
    return (module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer))
