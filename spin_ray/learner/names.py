"""What a model's tensors are called in its folder, and what shapes they have there.

In memory transformers renames tensors, and fuses or splits some: the experts of a mixture become one tensor. Everything that leaves
the learner has the folder's names and shapes again, by the same conversions that `save_pretrained` reverts, and next to the
parameters the persistent buffers, such as the router's correction bias of DeepSeek-V3.

    in memory   model.layers.0.mlp.experts.gate_up_proj            [num_experts, 2 * intermediate, hidden]
    in folder   model.layers.0.block_sparse_moe.experts.0.w1.weight, ...0.w3.weight, ...1.w1.weight ...     [intermediate, hidden] each
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from spin_ray.learner.quantized import blank

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Group:
    """Tensors in memory that are converted together; most groups are a single tensor with another name, or the same."""

    name: str
    """In the folder, or the first of several."""
    converter: WeightConverter | None
    members: dict[str, str] = field(default_factory=dict)
    """Name in memory -> the converter's pattern that it matches."""


class FolderNames:
    """The way back from a model's memory to its folder. Reads names and conversions once; holds no tensor."""

    def __init__(self, lm: PreTrainedModel):
        self._lm = lm
        self._in_memory = _tensors(lm)
        self._renamings, self._converters = _reverted(lm)
        order = {name: place for place, name in enumerate(self._in_memory)}
        groups = self._grouped(sorted(order, key=dot_natural_key)).values()  # transformers' order: some conversions depend on it
        self.groups = sorted(groups, key=lambda group: min(map(order.__getitem__, group.members)))

    def _grouped(self, names: list[str]) -> dict[str, Group]:
        by_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        groups: dict[str, Group] = {}
        for name in names:
            renamed, pattern = rename_source_key(name, self._renamings, self._converters, reverse=True)
            group = groups.setdefault(renamed, Group(renamed, by_pattern.get(pattern)))
            group.members[name] = pattern or name
        return groups

    def of(self, group: Group) -> list[torch.Tensor]:
        """The live tensors of a group: parameters and buffers."""
        return [self._in_memory[name] for name in group.members]

    def convert(self, group: Group, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The group's tensors, in the order of `of`, as they are in the folder: views where nothing has to be put together."""
        if group.converter is None:
            return {group.name: tensors[0]}
        converter = deepcopy(group.converter)
        for (name, pattern), tensor in zip(group.members.items(), tensors, strict=True):
            converter.add_tensor(group.name, name, pattern, tensor)
        converted = converter.convert(group.name, model=self._lm, config=self._lm.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def tied(self) -> dict[str, str]:
        """Second name of a weight that has two -> the name under which it is in `groups`; both as in the folder."""
        first = {id(tensor): name for name, tensor in self._in_memory.items()}
        every = dict(_without_adapter(self._lm.named_parameters(remove_duplicate=False)))
        return {self._renamed(name): self._renamed(first[id(p)]) for name, p in every.items() if first[id(p)] != name}

    def _renamed(self, name: str) -> str:
        return rename_source_key(name, self._renamings, self._converters, reverse=True)[0]


def _tensors(lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All that a folder holds, by its name in memory, in the model's order: parameters and persistent buffers.

    A tied weight comes once, under the name that transformers keeps.
    """
    live = dict(_without_adapter(lm.named_parameters(remove_duplicate=False))) | dict(lm.named_buffers(remove_duplicate=False))
    second = set(getattr(lm, "all_tied_weights_keys", {}))
    every, ignored = dict(_without_adapter(lm.state_dict().items())), lm._keys_to_ignore_on_save or ()
    names = [name for name in every if name in live and name not in ignored]
    kept: dict[int, str] = {}
    for name in sorted(names, key=lambda name: name in second):
        kept.setdefault(id(live[name]), name)
    return {name: live[name] for name in names if kept[id(live[name])] == name}


def _without_adapter(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Under the names that a model has without a low-rank adapter (adapter.py), and without the adapter's own tensors."""
    return ((name.replace(".base_layer.", "."), tensor) for name, tensor in tensors if ".lora_" not in name)


def _reverted(lm: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """The conversions of `from_pretrained`, turned round, as `transformers.core_model_loading.revert_weight_conversion` does it."""
    conversions: list[WeightTransform] | None = getattr(lm, "_weight_conversions", None)
    if conversions is None:  # a part of a loaded model, or one made without a folder
        conversions = [each for each in get_model_conversion_mapping(lm, add_legacy=False) if not isinstance(each, PrefixChange)]
    turned = [each.reverse_transform() for each in reversed(conversions)]
    return [each for each in turned if isinstance(each, WeightRenaming)], [each for each in turned if isinstance(each, WeightConverter)]


def export_layout(lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> every tensor that an export of `lm` has, on torch's meta device: so weights may be sharded or absent."""
    names = FolderNames(lm)
    return {
        name: tensor
        for group in names.groups
        for name, tensor in names.convert(group, [blank(tensor) for tensor in names.of(group)]).items()
    }


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
