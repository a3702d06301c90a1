"""A model that no rank holds whole: under ZeRO-3 every tensor is cut into the ranks' shards as soon as transformers has read it.

transformers reads a folder tensor by tensor and puts each, renamed and converted as the family needs it, into its module. In that moment
DeepSpeed makes it a sharded parameter here: all ranks read the same tensor, keep their part, and forget the rest before the next one.
Transformers' own way with ZeRO-3 reads all files into every rank's memory first.

Weights that may be tied stay whole until all is read, because transformers then compares them: of most models one, its embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils


def read_in_shards(
    read: Callable[[], PreTrainedModel], config: dict[str, Any], *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model that `read` makes by `from_pretrained`, in DeepSpeed's shards. A collective. `config`: DeepSpeed's.

    Every parameter gets the dtype, as in a whole model DeepSpeed gives it: some families keep a few in float32. Buffers go to the device.
    """
    first: list[nn.Parameter] = []

    def cut(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(dtype)
        if first:
            first[0].convert_to_zero_parameters(param_list=[parameter])
        else:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config)
            first.append(parameter)

    def cut_if_never_tied(lm: PreTrainedModel, name: str) -> None:
        parameter, tied = lm.get_parameter_or_buffer(name), lm.all_tied_weights_keys
        if isinstance(parameter, nn.Parameter) and not parameter.is_meta and name not in {*tied, *tied.values()}:
            cut(parameter)

    with _told_of_every_tensor(cut_if_never_tied):
        lm = read()
    for parameter in lm.parameters():
        if not is_zero_param(parameter):
            cut(parameter)
    for module in lm.modules():  # DeepSpeed moves the buffers of a whole model alone
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    return lm


@contextmanager
def _told_of_every_tensor(tell: Callable[[PreTrainedModel, str], None]) -> Iterator[None]:
    """While the body runs, `from_pretrained` reads one tensor after the other, without threads that read ahead, and tells of each."""
    put, open_file = core_model_loading.set_param_for_module, modeling_utils.safe_open

    def open_unmapped(*args: Any, **options: Any) -> Any:  # pages of a mapped file stay in memory until it is closed
        return open_file(*args, **{**options, "backend": "pread"})

    def put_and_tell(lm: PreTrainedModel, name: str, *rest: Any) -> None:
        put(lm, name, *rest)
        tell(lm, name)

    with (
        mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
        mock.patch.object(core_model_loading, "set_param_for_module", put_and_tell),
        mock.patch.object(modeling_utils, "safe_open", open_unmapped),
    ):
        yield
