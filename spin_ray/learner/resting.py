"""A device's memory given back while somebody else computes there, and taken again with what was in it.

Not by moving tensors, which are known under many names: a parameter, DeepSpeed's view of it in a flat buffer, an optimizer's state. Every
storage that any tensor of this process has on the device is emptied in place (`resize_`), after its bytes have been copied to the host, and
filled again. Whoever holds a tensor, whatever the ZeRO stage and the optimizer, holds the same one afterwards.
DeepSpeed's own `offload_states` takes only some stages and optimizers.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable

import torch


class Resting:
    """What lay on a device, while it is given back."""

    def __init__(self, device: torch.device, forgotten: Iterable[torch.Tensor] = ()):
        """Frees the device's memory. `forgotten`: tensors whose values nobody needs: they come back as zeros."""
        self._device, self._cuda = device, device.type == "cuda"
        zeros = {tensor.untyped_storage().data_ptr() for tensor in forgotten}
        if self._cuda:
            torch.cuda.synchronize(device)
        self._held: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] = []
        """Every storage, its bytes, and a copy of them; none of what is forgotten."""
        for storage in _storages(device):
            copy = None if storage.data_ptr() in zeros else self._copy(storage)
            self._held.append((storage, storage.nbytes(), copy))
        for storage, _, _ in self._held:
            storage.resize_(0)
        if self._cuda:
            torch.cuda.empty_cache()

    @property
    def num_bytes(self) -> int:
        """That were given back."""
        return sum(size for _, size, _ in self._held)

    def _copy(self, storage: torch.UntypedStorage) -> torch.Tensor:
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._cuda)
        return copy.copy_(_bytes_of(storage))

    def end(self) -> None:
        """Take the memory back."""
        while self._held:
            storage, size, copy = self._held.pop()
            storage.resize_(size)
            _bytes_of(storage).zero_() if copy is None else _bytes_of(storage).copy_(copy)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(device: torch.device) -> Collection[torch.UntypedStorage]:
    """Each once, whoever holds it. No Python object may hold a gradient, but one holds its parameter."""
    found: dict[int, torch.UntypedStorage] = {}
    known = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    for tensor in [*known, *(each.grad for each in known if each.is_leaf and each.grad is not None)]:
        if tensor.device == device and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                found[storage.data_ptr()] = storage
    return found.values()
