"""A folder's model by transformers' own code, as the learner packs its rows or as transformers means it. No DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from spin_ray.errors import BadInput, in_one_line
from spin_ray.families import auto_class
from spin_ray.learner import attention
from spin_ray.model import refuse_unsupported
from spin_ray.records import Saved


def load_model(model_path: str, *, attention: str | None = attention.NAME, **options: Any) -> Any:
    """The model with packed attention, or another one; transformers' own code, weights from safetensors: a folder's code and pickles do
    not run here. `attention`: None leaves it to transformers.

    Raises BadInput for a family that would not be computed exactly, and for weights that cannot be loaded.
    """
    config = _config_of(model_path)
    refuse_unsupported(config, model_path)
    try:
        return auto_class(config).from_pretrained(
            model_path, config=config, use_safetensors=True, attn_implementation=attention, trust_remote_code=False, **options
        )
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{model_path}: no weights in safetensors can be loaded from there: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise BadInput(f"{model_path}: its weights have other shapes than its config.json says: {in_one_line(error)}") from error


def load_to_generate(saved: Saved, *, dtype: str, device: str) -> Any:
    """The same, for transformers' own `generate`: with its adapter, without gradients, on a device. Raises BadInput."""
    lm = load_model(saved.model, attention=None, dtype=getattr(torch, dtype))
    if saved.adapter:
        from spin_ray.learner.adapter import Adapter  # not at the top: it loads peft

        Adapter(lm, Path(saved.adapter))
    return lm.eval().requires_grad_(False).to(device)


def _config_of(model_path: str) -> Any:
    if Path(model_path).is_absolute() and not Path(model_path).is_dir():
        raise BadInput(f"{model_path}: no such folder; every host must have it")
    try:
        return AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{model_path}: its config.json cannot be read: {str(error).splitlines()[0]}") from error
