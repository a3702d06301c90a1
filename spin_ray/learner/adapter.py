"""A low-rank adapter in the main player's model, by peft. Its parameters are all that is trained; the base never changes.

    in memory   model.layers.0.self_attn.q_proj.lora_A.default.weight, the base's weight beside it as ...q_proj.base_layer.weight
    in folder   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

Merging is done into a copy: in half precision, merging and unmerging in place does not give the base back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from spin_ray.config import LoraConfig
from spin_ray.errors import BadInput
from spin_ray.exchange.adapters import PREFIX, AdapterFiles, new_adapter, read_adapter
from spin_ray.learner.logps import body
from spin_ray.learner.quantized import true_shape

_NAME = "default"
"""peft's for the adapter that it puts in first."""


def linear_layers(lm: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> inputs and outputs of the linear layers that can be adapted: all below the output layer.

    Of a mixture of experts only those of the attention: experts are stacked parameters, and peft takes every layer that is called like
    a part of an expert, such as a shared expert's, for one.
    """
    below, head = {id(module) for module in body(lm).modules()}, lm.get_output_embeddings()
    mixture = any(len(true_shape(parameter)) > 2 for parameter in body(lm).parameters())
    return {
        name: (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (module.nx, module.nf)
        for name, module in lm.named_modules()
        if type(module) in (nn.Linear, Conv1D) and id(module) in below and module is not head and not (mixture and "attn" not in name)
    }


def first_adapter(lm: nn.Module, lora: LoraConfig, *, base: str, seed: int) -> AdapterFiles:
    """theta_0's: one that changes nothing yet. `lm` may be on torch's meta device. Raises BadInput for a target that is not there."""
    chosen = _chosen(lm, lora)
    return new_adapter(chosen, _named(lm, chosen), base=base, rank=lora.rank, alpha=lora.scale, seed=seed)


def put_into_blank(lm: nn.Module, lora: LoraConfig) -> None:
    """An adapter without values in a model on torch's meta device, all else frozen: to count what it takes. Raises BadInput as above."""
    peft = PeftConfig(
        r=lora.rank, lora_alpha=lora.scale, target_modules=_named(lm, _chosen(lm, lora)), init_lora_weights=False, task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        inject_adapter_in_model(peft, lm)
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(lm.dtype)


def _chosen(lm: nn.Module, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """The layers that are to be adapted, with their inputs and outputs."""
    layers = linear_layers(lm)
    known = sorted(set(map(_last, layers)))
    if unknown := [target for target in lora.target if target not in known]:
        raise BadInput(f"lora.target: this model has no linear layer {unknown[0]}; it has {', '.join(known)}")
    return {name: sizes for name, sizes in layers.items() if not lora.target or _last(name) in lora.target}


def check_of_model(lm: nn.Module, files: AdapterFiles, folder: str) -> None:
    """Raise BadInput, naming the first tensor, for an adapter of layers that are not adapted here. `lm` may be on the meta device."""
    layers, parts = linear_layers(lm), {}
    for name, tensor in sorted(files.tensors.items()):
        layer, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if layer not in layers or part not in ("lora_A", "lora_B"):
            raise BadInput(f"{folder}: {name}: the base has no such linear layer below its output layer; only those are adapted here")
        parts.setdefault(layer, {})[part] = tuple(tensor.shape)
    for layer, shapes in parts.items():
        (num_in, num_out), rank = layers[layer], shapes.get("lora_A", (0,))[0]
        if shapes != {"lora_A": (rank, num_in), "lora_B": (num_out, rank)}:
            raise BadInput(f"{folder}: {layer} takes {num_in} numbers and gives {num_out}; the adapter's {shapes} do not fit it")
    if not parts:
        raise BadInput(f"{folder}: there is no tensor in its adapter")


def _named(lm: nn.Module, chosen: Collection[str]) -> list[str]:
    """What peft is to call the chosen layers: by the last part of their names, or in full where something else has that part too."""
    short = {_last(name) for name in chosen}
    every = [name for name, _ in [*lm.named_modules(), *lm.named_parameters()]]
    return sorted(chosen if any(_last(name) in short and name not in chosen for name in every) else short)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


class Adapter:
    """The adapter of a folder, put into a model; everything else in the model is frozen."""

    def __init__(self, lm: nn.Module, folder: Path):
        """Raises BadInput, naming the first tensor, where the folder's adapter is not one of this model."""
        files = read_adapter(folder)
        self._config, dtype = files.config, lm.dtype
        peft = PeftConfig.from_pretrained(str(folder))
        peft.inference_mode = False  # with it, as in files, nothing would be trained
        inject_adapter_in_model(peft, lm)
        self._layers = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(dtype)  # peft keeps it in float32
        self._check(files.tensors, folder)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(files.tensors[name])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name in the folder -> live parameter, in the model's order."""
        return {
            f"{PREFIX}{name}.{part}.weight": getattr(layer, part)[_NAME].weight
            for name, layer in self._layers.items() for part in ("lora_A", "lora_B")
        }

    def _check(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        own = self.parameters
        if strange := sorted(own.keys() ^ tensors.keys()):
            where = "the adapter's file lacks" if strange[0] in own else "the model has no place for"
            raise BadInput(f"{folder}: {where} {strange[0]}")
        for name, parameter in own.items():
            if (shape := true_shape(parameter)) != tensors[name].shape:
                raise BadInput(f"{folder}: {name} is {list(tensors[name].shape)}, for this model it must be {list(shape)}")

    def read(self, folder: Path) -> list[torch.Tensor]:
        """Another adapter of the same shape, in the order of `parameters`. Raises BadInput."""
        tensors = read_adapter(folder).tensors
        self._check(tensors, folder)
        return [tensors[name].to(parameter.dtype) for name, parameter in self.parameters.items()]

    def of(self, name: str) -> list[nn.Parameter]:
        """The parameters that change a weight of the base, by that one's name without an adapter; none for most."""
        layer = self._layers.get(name.removesuffix(".weight"))
        return [] if layer is None else [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]

    @torch.no_grad()
    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter's part, in a copy where there is one: W + scale B A, added in float32."""
        if not (parts := self.of(name)):
            return weight
        layer = self._layers[name.removesuffix(".weight")]
        a, b = (part.detach().to(weight.device, torch.promote_types(part.dtype, torch.float32)) for part in parts)
        delta = layer.scaling[_NAME] * (b @ a)
        return (weight.to(delta.dtype) + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)

    def files(self, tensors: Mapping[str, torch.Tensor]) -> AdapterFiles:
        """As they are written; `tensors`: the parameters, gathered."""
        return AdapterFiles(self._config, dict(tensors))
