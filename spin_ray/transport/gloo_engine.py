"""vLLM's NCCL weight-transfer engine with gloo in place of NCCL, for CPUs: the handshake, the packing and the loading are vLLM's own."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor


class GlooGroup:
    """Has what vLLM uses of its PyNcclCommunicator."""

    def __init__(self, info: Any, rank: int):
        listening = _listen(info.master_address, info.master_port) if rank == 0 else None
        self._group = stateless_init_torch_distributed_process_group(
            info.master_address, info.master_port, rank, info.world_size, "gloo", listen_socket=listening
        )

    def broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0."""
        self._group.broadcast([tensor], dist.BroadcastOptions()).wait()

    def destroy(self) -> None:
        self._group = None


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket()
    listening.bind((host, port))
    listening.listen()
    return listening


class GlooTrainerInfo(NCCLTrainerInitInfo):
    backend: ClassVar[str] = "gloo"


class GlooTrainer(NCCLTrainerWeightTransferEngine):
    """The sender's end."""

    @classmethod
    def trainer_init(cls, init_info: GlooTrainerInfo, *, client: Any, source: Any = None) -> GlooTrainer:
        engine = cls(client=client, source=source, packed_buffer_size_bytes=init_info.packed_buffer_size_bytes)
        wanted = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address, master_port=init_info.master_port, rank_offset=1, world_size=init_info.world_size,
            packed=True, packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
        )
        with ThreadPoolExecutor(max_workers=1) as other_end:  # both ends come together in the rendezvous
            joined = other_end.submit(client.init_weight_transfer_engine, worker_init_payload(wanted))
            engine.model_update_group = GlooGroup(init_info, rank=0)
            joined.result()
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        tensors = self._checked_iter(source, meta)
        while chunk := pack_tensors(tensors, lambda entry: entry[1], self.packed_buffer_size_bytes):
            self.model_update_group.broadcast(chunk.packed_tensor)


class GlooEngine(NCCLWeightTransferEngine):
    """The engine's end, in vLLM's worker."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.model_update_group = GlooGroup(init_info, rank=init_info.rank_offset + self.parallel_config.rank)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        for names, dtypes, shapes, sizes in self._chunks(update_info):
            packed = torch.empty(sum(sizes), dtype=torch.uint8)
            self.model_update_group.broadcast(packed)
            self.model.load_weights(unpack_tensor(packed, names, shapes, dtypes, sizes))

    def _chunks(self, info: NCCLWeightTransferUpdateInfo) -> Iterator[tuple[list[Any], ...]]:
        """(names, dtypes, shapes, bytes) of what `pack_tensors` puts together at the other end."""
        dtypes = [getattr(torch, name) for name in info.dtype_names]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(info.shapes, dtypes, strict=True)]
        entries = iter(zip(info.names, dtypes, info.shapes, sizes, strict=True))
        while chunk := list(_until_full(entries, self.packed_buffer_size_bytes)):
            yield tuple(map(list, zip(*chunk, strict=True)))


def _until_full(entries: Iterator[tuple[Any, ...]], limit: int) -> Iterator[tuple[Any, ...]]:
    """As many entries as `pack_tensors` takes: up to and with the one that goes past the limit."""
    total = 0
    for entry in entries:
        yield entry
        total += entry[-1]
        if total > limit:
            return
