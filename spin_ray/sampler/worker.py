"""What vLLM's workers do for us in their own processes: named methods, which `collective_rpc` calls; nothing is pickled.

`EngineArgs(worker_extension_cls=...)` makes the worker's class inherit from this one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from spin_ray.background import end_with, in_background


class WorkerExtension:
    """Methods beside those of vLLM's Worker."""

    model_runner: Any
    device: torch.device
    weight_transfer_engine: Any
    parallel_config: Any

    def module_names(self) -> list[str]:
        """Names of all parts of the model, the shared ones under each of their names."""
        return [name for name, _ in self.model_runner.get_model().named_modules(remove_duplicate=False)]

    def reload_opponent(
        self, tensors: Iterable[tuple[str, torch.Tensor]] | None = None, folder: str | None = None, trial: bool = False
    ) -> None:
        """Replace all weights, by `tensors` or by those of a folder.

        Raises RuntimeError naming what keeps its old weights: vLLM only logs that, or says nothing. In a `trial`, with the weights
        that the engine has, a tied output layer may keep them: under which names it wants them only the learner knows.
        """
        model = self.model_runner.get_model()
        if self.device.type == "cpu":
            _pack_experts_anew(model)
        load_weights, shared = model.load_weights, _shared(model)

        def load_all(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
            loaded = load_weights(weights)
            if kept := [name for name in _kept(model) if not (trial and name in shared)]:
                raise RuntimeError(_cannot_replace(model, kept))
            return loaded

        model.load_weights = load_all
        try:
            self.model_runner.reload_weights(weights_iterator=tensors, weights_path=folder)
        finally:
            del model.load_weights

    def join_transfer(self, init_info: dict[str, Any]) -> None:
        """Join a sender's group. Several workers are processes that, blocked, would outlive the engine's: from here on they do not."""
        self._transfer_over = threading.Event()
        if self.parallel_config.world_size > 1:
            in_background(end_with, os.getppid(), self._transfer_over)
        self.init_weight_transfer_engine(init_info)
        if getattr(self.weight_transfer_engine.model_update_group, "disabled", False):
            raise RuntimeError("there is no NCCL library, or VLLM_DISABLE_PYNCCL is set: nothing would be received, and nobody told")

    def begin_transfer(self) -> None:
        """Before all weights come by vLLM's weight-transfer engine."""
        if self.device.type == "cpu":
            _pack_experts_anew(self.model_runner.get_model())
        self.start_weight_update()

    def end_transfer(self) -> None:
        """When all have come; leaves the group. Raises RuntimeError naming what keeps its old weights, as `reload_opponent`."""
        model = self.model_runner.get_model()
        if kept := _kept(model):
            raise RuntimeError(_cannot_replace(model, kept))
        self.finish_weight_update()
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()
        self.shutdown_weight_transfer_engine()
        self._transfer_over.set()

    def take_adapter(
        self, number: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None, folder: str | None = None
    ) -> None:
        """Hold an adapter in memory: requests that name it by its number play with it, whatever their path says.

        One at a time; requests that name another one raise KeyError. `folder`: where the tensors lie, if they are not given.
        Raises RuntimeError for an adapter of other layers than the one before, or of a layer that vLLM does not adapt: it would be
        left out, and nobody told.
        """
        tensors = dict(tensors) if folder is None else load_file(f"{folder}/{ADAPTER_FILE}")
        manager = self.model_runner.lora_manager
        names = frozenset(tensors)
        if strange := sorted(names ^ getattr(self, "_adapter_names", names)):
            raise RuntimeError(f"this adapter and the one before do not both have {strange[0]}")
        self._adapter_names = names

        def load(request: Any) -> Any:
            return _adapter(manager, request.lora_int_id, *held[request.lora_int_id])

        held = {number: (tensors, config)}
        manager._load_adapter = load


ADAPTER_FILE = "adapter_model.safetensors"


def _adapter(manager: Any, number: int, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    """vLLM's form of an adapter, made as vLLM does it from a folder."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    inner, helper = manager._adapter_manager, PEFTHelper.from_dict(dict(config))
    helper.validate_legal(manager.lora_config)
    mapper = getattr(inner.model, "hf_to_vllm_mapper", None)
    lora = LoRAModel.from_lora_tensors(
        number, {name: tensor.clone() for name, tensor in tensors.items()}, helper,  # copies: vLLM multiplies B by the scale in place
        device="cpu", dtype=manager.lora_config.lora_dtype, model_vocab_size=manager.vocab_size,
        weights_mapper=mapper and mapper.get_rename_mapper(), skip_prefixes=getattr(inner.model, "lora_skip_prefixes", None),
    )
    known = set(inner.modules).union(*inner.packed_modules.values())
    if unknown := sorted(lora.loras.keys() - known):
        kind = type(inner.model).__name__
        raise RuntimeError(f"vLLM adapts no {unknown[0]} in a {kind}: set lora.sync=merged, or a lora.target without it")
    return lora


def _kept(model: torch.nn.Module) -> list[str]:
    """The model's parts that hold parameters and have got none since a reload began.

    A part of the model that has its weights takes no more (`can_load`). Attention is done at the end, and holds only scales.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    waiting = [
        (name, module, get_layerwise_info(module)) for name, module in model.named_modules()
        if any(each is not None for each in module._parameters.values()) and not is_deferred_attention_layer(module)
    ]
    return [name for name, _, info in waiting if info.can_load() and info.load_numel_total and not info.load_numel]


def _cannot_replace(model: torch.nn.Module, kept: list[str]) -> str:
    return f"vLLM cannot replace all weights of a {type(model).__name__}: {len(kept)} parts keep theirs, first {kept[0]}"


def _shared(model: torch.nn.Module) -> set[str]:
    """The model's parts whose parameters are also another part's."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter.data_ptr(), set()).add(name)
    return set().union(*(names for names in owners.values() if len(names) > 1))


def _pack_experts_anew(model: torch.nn.Module) -> None:
    """vLLM 0.32 packs a mixture's experts for its CPU kernels when it sets the kernel up, and leaves them unpacked when it reloads.

    So the kernel is set up again. On GPUs, where graphs have captured it, vLLM does the same to the weights every time.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
