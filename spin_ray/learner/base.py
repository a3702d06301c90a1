"""The base that both players of a run with `model.quantization` play with, written once when the run begins.

The sampler's engine knows no NF4, so the folder holds, in the dtype that both compute in, what the 4 bits stand for. Samplers load it
as it is; the learner quantises it again, which changes nothing more (quantized.py). On whatever machine either of them runs, it is the
same base.
"""

from __future__ import annotations

from pathlib import Path

import torch

from spin_ray.learner.adapter import linear_layers
from spin_ray.learner.export import read_beside, write_model
from spin_ray.learner.loading import load_model
from spin_ray.learner.names import FolderNames
from spin_ray.learner.quantized import plain, quantize


def write_base(source: str, folder: Path, *, dtype: str, trust_remote_code: bool) -> None:
    """Write the model of a folder as another one. In a process of its own: it holds the whole model. Raises BadInput."""
    lm = load_model(source, dtype=getattr(torch, dtype))
    quantize(lm, linear_layers(lm), torch.device("cpu"))
    names = FolderNames(lm)
    buckets = (list(names.convert(group, [plain(tensor) for tensor in names.of(group)]).items()) for group in names.groups)
    write_model(lm, buckets, folder, read_beside(source, trust_remote_code=trust_remote_code))
