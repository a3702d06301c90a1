"""Weights on their way from learner to sampler, through Ray's object store.

The learner puts flat buckets of bytes; a sampler maps them and builds tensors as views, without a copy. The number of
remote calls depends on the number of buckets (total bytes / bucket size), never on the number of parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

BUCKET_BYTES = 256 * 2**20
_ALIGN = 64


@dataclass(frozen=True)
class WeightBucket:
    """Some tensors in one piece of memory."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    """Byte where each tensor begins, a multiple of 64."""
    data: np.ndarray
    """[num_bytes] uint8."""


@dataclass(frozen=True)
class PublishedWeights:
    """One version of the weights, ready to be loaded by any number of samplers."""

    version: int
    buckets: tuple[Any, ...]
    """Ray references to the WeightBuckets, in the order of the model's parameters."""
    num_bytes: int
    tied_names: Mapping[str, str] = field(default_factory=dict)
    """Second name -> first name of weights that the model knows twice."""


def to_bucket(tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightBucket:
    """Copy CPU tensors into one flat bucket."""
    tensors = list(tensors)
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN for _, tensor in tensors]
    offsets = [int(offset) for offset in np.cumsum([0, *sizes[:-1]])]
    data = np.empty(sum(sizes), np.uint8)
    for (_, tensor), offset in zip(tensors, offsets, strict=True):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        data[offset : offset + len(raw)] = raw
    return WeightBucket(
        tuple(name for name, _ in tensors), tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        tuple(tuple(tensor.shape) for _, tensor in tensors), tuple(offsets), data,
    )


def from_bucket(bucket: WeightBucket, tied_names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The bucket's tensors as views of its memory; a tied weight comes again under its second name.

    vLLM loads tied embeddings right only if the update carries both names; without the second it keeps the old output
    layer and says nothing.
    """
    also = {first: second for second, first in tied_names.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the object store's memory; only read here
        flat = torch.from_numpy(bucket.data)
    for name, dtype, shape, offset in zip(bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets, strict=True):
        dtype = getattr(torch, dtype)
        tensor = flat[offset : offset + int(np.prod(shape)) * dtype.itemsize].view(dtype).view(shape)
        yield name, tensor
        if name in also:
            yield also[name], tensor
