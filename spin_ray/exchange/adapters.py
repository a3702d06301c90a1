"""A low-rank adapter's folder, as peft and vLLM read it: `adapter_config.json` and `adapter_model.safetensors`.

W + scale B A, where A [rank, in] and B [out, rank] are the tensors `base_model.model.<module>.lora_A.weight` and `...lora_B.weight`
(Hu et al., arXiv 2106.09685); scale is alpha / rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spin_ray.errors import BadInput

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_NOT_PLAIN = {
    "use_dora": "DoRA", "modules_to_save": "modules that it replaces", "target_parameters": "adapted parameters that are no layers",
    "trainable_token_indices": "trained tokens", "layer_replication": "replicated layers", "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA", "lora_bias": "biases", "bias": "trained biases", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow",
}
"""What peft can put into an adapter, and sampler and learner would not compute alike."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which peft changes the base's weights when it puts the adapter in."""


@dataclass(frozen=True)
class AdapterFiles:
    """What is in an adapter's folder."""

    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, torch.Tensor]

    @property
    def largest_rank(self) -> int:
        """Of all layers: `rank_pattern` may give some another one than `r`."""
        return max([self.config["r"], *(tensor.shape[0] for name, tensor in self.tensors.items() if ".lora_A." in name)])

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(dict(self.config), indent=2, sort_keys=True) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path) -> AdapterFiles:
    """Raises BadInput, naming the file, for a folder that holds no plain adapter."""
    try:
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        missing = Path(error.filename or WEIGHTS).name
        raise BadInput(f"{folder}: no adapter there: {missing} is missing (pickled weights are not loaded)") from error
    except (ValueError, SafetensorError) as error:
        raise BadInput(f"{folder}: its adapter cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadInput(f"{folder / CONFIG}: no LoRA adapter (peft_type={config.get('peft_type') if isinstance(config, dict) else None})")
    for key, what in _NOT_PLAIN.items():
        if config.get(key, "none") not in (None, False, [], {}, "none"):
            raise BadInput(f"{folder / CONFIG}: {key}={config[key]}: {what} cannot be trained or sampled here; merge it into its base")
    if str(config.get("init_lora_weights", True)).startswith(_CHANGES_THE_BASE):
        raise BadInput(
            f"{folder / CONFIG}: init_lora_weights={config['init_lora_weights']} changed the base as well; let peft convert it to plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion), or merge it into its base"
        )
    if not isinstance(config.get("r"), int):
        raise BadInput(f"{folder / CONFIG}: r, the adapter's rank, is missing")
    return AdapterFiles(config, tensors)


def new_adapter(
    layers: Mapping[str, tuple[int, int]], targets: Sequence[str], *, base: str, rank: int, alpha: float, seed: int
) -> AdapterFiles:
    """An adapter that changes nothing yet: A as peft draws it, uniform in ± 1 / sqrt(in), B zero.

    `layers`: name -> inputs and outputs of every layer that is adapted; `targets`: how peft finds them.
    """
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (num_in, num_out) in layers.items():
        bound = 1 / math.sqrt(num_in)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.empty(rank, num_in).uniform_(-bound, bound, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(num_out, rank)
    return AdapterFiles({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "bias": "none", "target_modules": list(targets), "inference_mode": True,
    }, tensors)
