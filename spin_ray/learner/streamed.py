"""A model's safetensors files, written tensor by tensor, in any order, as they are gathered: nothing waits in memory for its file.

Names, shapes and dtypes of all tensors are known before, so every file begins with its whole header, and each tensor has its place. The
safetensors package writes whole files only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from spin_ray.errors import RunStopped
from spin_ray.exchange.weights import INDEX, WHOLE, bytes_of

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the format calls them."""

Layout = Mapping[str, torch.Tensor]
"""Name -> a tensor on torch's meta device, of the shape and dtype that is to be written."""


def not_writable(layout: Layout) -> list[str]:
    """Tensors of a dtype that the format has no word for, in words."""
    return [f"{name} is {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in layout.items() if tensor.dtype not in _DTYPES]


class StreamedFiles:
    """`model.safetensors`, or with an index several files of about `file_bytes`."""

    def __init__(self, layout: Layout, folder: Path, *, file_bytes: int):
        self._folder, self._missing = folder, dict(layout)
        self._places: dict[str, tuple[Path, int]] = {}
        parts = list(_parts(layout, file_bytes))
        for number, part in enumerate(parts, 1):
            path = folder / (WHOLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors")
            self._begin(path, part)
        if len(parts) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in layout.values())},
                "weight_map": {name: path.name for name, (path, _) in self._places.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2))

    def _begin(self, path: Path, part: Layout) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in sorted(part.items(), key=lambda item: -item[1].itemsize):  # so that all lie at multiples of their size
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            self._places[name] = path, begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        self._places |= {name: (path, 8 + len(text) + self._places[name][1]) for name in part}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises RunStopped for a tensor that has no such place, or had it before."""
        wanted = self._missing.pop(name, None)
        if wanted is None or (wanted.shape, wanted.dtype) != (tensor.shape, tensor.dtype):
            place = "none" if wanted is None else f"{list(wanted.shape)} {wanted.dtype}"
            raise RunStopped(f"{self._folder}: {name} is {list(tensor.shape)} {tensor.dtype}, and in the model's folder {place}")
        path, offset = self._places[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes_of(tensor).data)

    def end(self) -> None:
        """Raises RunStopped if a tensor has not been written."""
        if self._missing:
            number, first = len(self._missing), next(iter(self._missing))
            raise RunStopped(f"{self._folder}: {number} of the model's tensors were not written (first {first})")


def _parts(layout: Layout, file_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """At least one: of the order given, each cut off by the tensor that fills it."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in layout.items():
        part[name] = tensor
        size += tensor.nbytes
        if size >= file_bytes:
            yield part
            part, size = {}, 0
    if part:
        yield part
