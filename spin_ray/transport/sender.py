"""The learner's side of a transfer by vLLM's weight-transfer engines: a process beside rank 0 that brings one publication to all samplers.

It reads the buckets that rank 0 has gathered from its shards and put into this host's object store. So it holds up no training, and a
broadcast that hangs, in which a GPU would compute for ever, ends with this process. Every replica gets a group of its own, for one
transfer: the sender is rank 0 in it, the replica's workers come behind. So what starts anew finds no group that is half dead.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spin_ray.background import in_background
from spin_ray.chatter import redirect_output
from spin_ray.exchange.weights import BUCKET_BYTES, WeightBucket, from_bucket


@dataclass(frozen=True)
class Backend:
    """What differs between the transports that send: all the rest of a transfer is shared."""

    name: str
    """Of the engine, in vLLM's factories."""
    device: str
    """Where a tensor must lie that is broadcast."""
    register: Callable[[], None]
    """Makes the engine known to vLLM's factories, in whatever process."""
    trainer_info: Callable[..., Any]
    """vLLM's TrainerInitInfo of it; called with `rank`, `master_address`, `master_port`, `world_size`, `packed_buffer_size_bytes`."""
    chunk_bytes: int = BUCKET_BYTES
    """What is broadcast at a time; both ends of an NCCL transfer hold two of these."""


def start_sender(backend: Backend, *, log_path: str, env: Mapping[str, str], gpu: str) -> Any:
    """An actor on this node, owned by this process; returns at once, while it starts."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 1_000}
    return ray.remote(**options)(Sender).remote(backend, log_path=log_path, env=env, gpu=gpu)


class Sender:
    """Its process imports vLLM when it starts, and takes memory of the GPU when it sends."""

    def __init__(self, backend: Backend, *, log_path: str, env: Mapping[str, str], gpu: str):
        redirect_output(log_path)
        os.environ.update(env)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        import vllm.distributed.weight_transfer.nccl_engine  # noqa: F401 - takes seconds, which nobody should wait for later

        backend.register()
        self._backend = backend

    async def ready(self) -> None:
        """Answers as soon as its process can send."""

    async def send(
        self, buckets: Sequence[Any], second_names: Mapping[str, str], sampler: Any, num_workers: int, timeout_s: float
    ) -> None:
        """Bring the buckets into the engine of `sampler`, an actor, that many of whose workers take part. Raises what went wrong."""
        deadline = time.monotonic() + timeout_s
        await asyncio.wrap_future(in_background(self._send, buckets, second_names, sampler, num_workers, deadline))

    def _send(self, buckets: Sequence[Any], second_names: Mapping[str, str], sampler: Any, num_workers: int, deadline: float) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        source = self._source(ray.get(list(buckets)), second_names)
        address = ray.util.get_node_ip_address()
        info = self._backend.trainer_info(
            rank=0, master_address=address, master_port=_free_port(address), world_size=1 + num_workers,
            packed_buffer_size_bytes=self._backend.chunk_bytes,
        )
        engine = WeightTransferTrainerFactory.trainer_init(info, client=Client(sampler, deadline), source=source)
        try:
            engine.send_weights()
        finally:
            engine.shutdown()

    def _source(self, buckets: Sequence[WeightBucket], second_names: Mapping[str, str]) -> Any:
        return source_of(buckets, second_names, self._backend.device)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


class Client:
    """vLLM's VLLMWeightSyncClient for one sampler, with a deadline: its own client for Ray waits for ever."""

    def __init__(self, sampler: Any, deadline: float):
        self._sampler, self._deadline = sampler, deadline

    def _ask(self, verb: str, **arguments: Any) -> None:
        ray.get(self._sampler.serve_sender.remote(verb, arguments), timeout=max(0.0, self._deadline - time.monotonic()))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("join_transfer", init_info=init_info)

    def start_weight_update(self) -> None:
        self._ask("begin_transfer")

    def update_weights(self, update_info: Any) -> None:
        self._ask("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("end_transfer")


def source_of(buckets: Sequence[WeightBucket], second_names: Mapping[str, str], device: str) -> Any:
    """vLLM's WeightSource of published buckets, whose tied weights come under both names."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class BucketSource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors()]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            return ((name, tensor.to(device)) for name, tensor in self._tensors())

        def _tensors(self) -> Iterator[tuple[str, Any]]:
            return (entry for bucket in buckets for entry in from_bucket(bucket, second_names))

    return BucketSource()
