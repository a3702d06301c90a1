"""Weights on their way from learner to sampler, through Ray's object store.

The learner puts buckets of tensors, each written straight from the model's memory into the store; a sampler maps them
and reads them where they lie. Two copies in all, one on either side, and the number of remote calls depends on the number
of buckets (total bytes / bucket size), never on the number of parameters.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

BUCKET_BYTES = 256 * 2**20
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What transformers calls a model's only file of weights, and the list of several."""


@dataclass(frozen=True)
class WeightBucket:
    """Some tensors; Ray writes and maps each `data` as it is, at an aligned place."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    data: tuple[np.ndarray, ...]
    """Each tensor's bytes, [num_bytes] uint8."""

    @property
    def num_bytes(self) -> int:
        return sum(data.nbytes for data in self.data)


def to_bucket(tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightBucket:
    """CPU tensors as a bucket of views of their memory: put it into the object store before they change."""
    tensors = list(tensors)
    return WeightBucket(
        tuple(name for name, _ in tensors), tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        tuple(tuple(tensor.shape) for _, tensor in tensors),
        tuple(bytes_of(tensor) for _, tensor in tensors),
    )


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """[num_bytes] uint8; the tensor's own memory where it lies in one piece."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def from_folder(folder: Path, tied_names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model's folder, or of a model on the hub, those of `tied_names` under both names.

    Raises RuntimeError if there are none, or a tied weight under neither of its names: vLLM would keep what it has and say nothing.
    """
    names = {path: _names(path) for path in _weight_files(folder)}
    every = {name for in_file in names.values() for name in in_file}
    if not every:
        raise RuntimeError(f"{folder}: no weights in its *.safetensors")
    twice = {first if first in every else second: (first, second) for second, first in tied_names.items()}
    if missing := sorted(twice.keys() - every):
        raise RuntimeError(f"{folder}: no {missing} in its *.safetensors")
    repeated = {name for pair in twice.values() for name in pair} - twice.keys()
    for path, in_file in names.items():
        with safe_open(path, framework="pt") as file:
            for name in in_file:  # in their order: vLLM keeps all tensors of a layer until it is complete
                if name not in repeated:
                    tensor = file.get_tensor(name)
                    yield from ((each, tensor) for each in twice.get(name, (name,)))


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model's folder, or of a model on the hub; reads the files' headers only."""
    shapes = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_absolute() and not folder.is_dir():  # a name on the model hub; it is in this node's cache, or comes there
        folder = Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", INDEX]))
    index = folder / INDEX
    if index.exists():  # beside its files some models bring the same weights in another format
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    whole = folder / WHOLE
    return [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))


def from_bucket(bucket: WeightBucket, tied_names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The bucket's tensors as views of its memory; a tied weight comes again under its second name.

    vLLM loads tied embeddings right only if the update carries both names; without the second it keeps the old output
    layer and says nothing.
    """
    also = {first: second for second, first in tied_names.items()}
    for name, dtype, shape, data in zip(bucket.names, bucket.dtypes, bucket.shapes, bucket.data, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the object store's memory; only read here
            tensor = torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)
        yield name, tensor
        if name in also:
            yield also[name], tensor
