"""A ZeRO checkpoint that another number of ranks wrote, taken up: every rank picks its part of master weights and moments from their files.

DeepSpeed's own way (`ds_to_universal`) knows no moments but Adam's, writes all of it anew, and runs what a file's pickle names. Where each
parameter's elements lie is told by the files, and for the ranks that take them up by DeepSpeed's optimizer:

| ZeRO | a rank's flat tensors have, one parameter behind the other |
|---|---|
| 1, 2 | what lies between the rank's ends of all parameters in a line, so of a parameter anything from nothing to all |
| 3 | an equal part of each parameter, the last rank's padded |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

_GROUPS_AND_FLATS = (
    ("fp16_groups", "fp32_partitioned_groups_flat"), ("bit16_groups", "single_partition_of_fp32_groups"),
    ("bf16_groups", "fp32_groups_flat_partition"),
)
"""What DeepSpeed's optimizers call their groups of parameters and this rank's flat masters of each: ZeRO-3, ZeRO-1 and 2, bfloat16."""
MASTERS = "masters"
"""Our key of the fp32 weights, beside the optimizer's keys of its moments."""

Load = Callable[[Path], dict[str, Any]]
"""Reads a file, its tensors into the CPU's memory, and only those that are looked at: it maps the file."""


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter in a rank's flat tensor."""

    name: str
    begin: int
    """Of the parameter, flat."""
    count: int
    group: int
    """Of parameters that are flat together."""
    place: int
    """In the group's flat tensor."""


def num_ranks(folder: Path, load: Load) -> int | None:
    """How many wrote a checkpoint's folder; None without ZeRO, where any number may read it.

    Files of further ranks may lie there: of a larger group, which died while it wrote the same progress to an object store.
    """
    return _model_states(folder, load)["dp_world_size"] if _optimizer_files(folder) else None


def _model_states(folder: Path, load: Load) -> dict[str, Any]:
    return load(min(folder.glob("*_model_states.pt")))


def _optimizer_files(folder: Path) -> dict[int, Path]:
    return {int(path.name.split("pp_rank_")[1].split("_")[0]): path for path in folder.glob("*_optim_states.pt")}


class Shards:
    """The files of all ranks as if each parameter lay in one piece.

    Raises ValueError where a rank's file is missing, and for moments in 8 bits, whose blocks would be cut.
    """

    def __init__(self, folder: Path, load: Load):
        files, model = _optimizer_files(folder), _model_states(folder, load)
        ranks = range(model["dp_world_size"])
        if missing := [rank for rank in ranks if rank not in files]:
            raise ValueError(f"{len(ranks)} ranks wrote it, and the file of rank {missing[0]} is not there")
        self._ranks = [load(files[rank])["optimizer_state_dict"] for rank in ranks]
        self._pieces: dict[str, list[tuple[int, Piece]]] = {}
        sharded = "fp32_flat_groups" in self._ranks[0]
        shapes = model["param_shapes"] if sharded else []
        for rank, states in enumerate(self._ranks):
            pieces = _equal_parts(shapes, rank, len(self._ranks)) if sharded else self._between_ends(states["param_slice_mappings"])
            for piece in pieces:
                self._pieces.setdefault(piece.name, []).append((rank, piece))
        self.moments: dict[str, torch.Tensor] = self._state(0, 0)
        """Of the first rank's first group: to know which there are. What counts steps is the same in all."""
        if any(moment.dtype == torch.uint8 for moment in self.moments.values()):
            raise ValueError(f"written by {len(self._ranks)} workers; moments in 8 bits cannot be cut for another number")

    def _between_ends(self, groups: list[Mapping[str, Any]]) -> Iterator[Piece]:
        for group, fragments in enumerate(groups):
            for name, fragment in fragments.items():
                begin = sum(piece.count for _, piece in self._pieces.get(name, ()))  # of the ranks before
                yield Piece(name, begin, fragment.numel, group, fragment.start)

    def read(self, key: str, name: str, begin: int, count: int) -> torch.Tensor:
        """Elements of a parameter's masters or moments, [count]. Raises KeyError for a parameter that the files lack."""
        found = []
        for rank, piece in self._pieces[name]:
            first, last = max(begin, piece.begin), min(begin + count, piece.begin + piece.count)
            if first < last:
                found.append(self._flat(rank, key, piece.group)[piece.place + first - piece.begin :][: last - first])
        return torch.cat(found)

    def _flat(self, rank: int, key: str, group: int) -> torch.Tensor:
        if key != MASTERS:
            return self._state(rank, group)[key]
        states = self._ranks[rank]
        return (states.get("fp32_flat_groups") or states["single_partition_of_fp32_groups"])[group]

    def _state(self, rank: int, group: int) -> dict[str, torch.Tensor]:
        states = self._ranks[rank]
        return (states.get("base_optimizer_state") or states["optimizer_state_dict"])["state"][group]


def take_up(engine: deepspeed.DeepSpeedEngine, shards: Shards) -> None:
    """Put them into this rank's part, masters and moments; under ZeRO-3 the weights too, which are the masters rounded. A collective."""
    zero, names = engine.optimizer, {parameter: name for name, parameter in engine.module.named_parameters()}
    groups, flats = next((getattr(zero, groups), getattr(zero, flats)) for groups, flats in _GROUPS_AND_FLATS if hasattr(zero, groups))
    sharded = hasattr(groups[0][0], "ds_tensor")
    if sharded:
        zero.checkpoint_event_prologue()  # small parameters are whole on every rank until then
    shapes = [{names[parameter]: parameter.ds_shape for parameter in group} for group in groups] if sharded else []
    own = list(_equal_parts(shapes, engine.global_rank, engine.world_size) if sharded else _fragments_of(groups, names))
    parameters = {name: parameter for parameter, name in names.items()}
    for group, flat in enumerate(flats):
        state, fused = zero.optimizer.state[flat], zero.optimizer.param_groups[0].get("fused")
        steps_are_on = flat.device if fused else "cpu"
        for key, moment in shards.moments.items():  # none are there before the first step
            state[key] = torch.zeros_like(flat, dtype=moment.dtype) if moment.ndim else moment.to(steps_are_on, copy=True)
        for piece in (piece for piece in own if piece.group == group and piece.count):
            mine = slice(piece.place, piece.place + piece.count)
            for key, to in ((MASTERS, flat.data), *((key, moment) for key, moment in state.items() if moment.ndim)):
                to[mine] = shards.read(key, piece.name, piece.begin, piece.count)
            if sharded:
                parameters[piece.name].ds_tensor.data[: piece.count] = flat.data[mine]
    if sharded:
        zero.checkpoint_event_epilogue()


def _equal_parts(groups: list[Mapping[str, torch.Size]], rank: int, num_ranks: int) -> Iterator[Piece]:
    for group, shapes in enumerate(groups):
        place = 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // num_ranks)
            yield Piece(name, rank * size, max(0, min(size, shape.numel() - rank * size)), group, place)
            place += size


def _fragments_of(groups: Sequence[Sequence[torch.nn.Parameter]], names: Mapping[torch.nn.Parameter, str]) -> Iterator[Piece]:
    for group, parameters in enumerate(groups):
        for parameter in parameters:
            if mapping := parameter._hp_mapping:
                place, part = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                yield Piece(names[parameter], part.start, part.numel, group, place.start)
