"""On a cluster: one publication is fetched by two samplers' transports at the same time. Prints what came over the network, as JSON."""

import json
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import ray
import torch

from spin_ray.config import WeightsConfig
from spin_ray.exchange.weights import to_bucket
from spin_ray.records import PublishedWeights, Version
from spin_ray.storage import DISK
from spin_ray.transport import transport_of

NUM_BUCKETS, NUM_TENSORS, TENSOR_BYTES = 3, 4, 4 * 2**20


class Publisher:
    def publish(self) -> tuple[PublishedWeights, int]:
        """Random weights, and the sum of their bytes."""
        rng, total, references = np.random.default_rng(0), 0, []
        for k in range(NUM_BUCKETS):
            arrays = [rng.integers(0, 256, TENSOR_BYTES, np.uint8) for _ in range(NUM_TENSORS)]
            total += sum(int(array.sum(dtype=np.int64)) for array in arrays)
            references.append(ray.put(to_bucket((f"layer.{k}.{j}.weight", torch.from_numpy(array)) for j, array in enumerate(arrays))))
        return PublishedWeights(Version(1), tuple(references), NUM_BUCKETS * NUM_TENSORS * TENSOR_BYTES), total


class Engine:
    """Keeps only the sum of what it is given."""

    def __init__(self) -> None:
        self.sum = 0

    def second_names(self, tied_names: dict[str, str]) -> dict[str, str]:
        return {}

    def load(self, version: Version, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Future:
        self.sum = sum(int(tensor.numpy().sum(dtype=np.int64)) for _, tensor in tensors())
        loaded: Future = Future()
        loaded.set_result(version)
        return loaded


class Reader:
    def __init__(self) -> None:
        self._way, self._engine = transport_of(WeightsConfig()), Engine()

    def host(self) -> str:
        return socket.gethostname()

    def received_bytes(self) -> int:
        """By this host since it booted."""
        (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0" in line]
        return int(line.partition(":")[2].split()[0])

    async def load(self, weights: PublishedWeights) -> int:
        await self._way.load(self._engine, weights, DISK)
        return self._engine.sum


def main() -> None:
    ray.init(log_to_driver=False)
    publisher = ray.remote(num_cpus=0, label_selector={"role": "learner"})(Publisher).remote()
    readers = [ray.remote(num_cpus=0, label_selector={"role": "sampler"})(Reader).remote() for _ in range(2)]
    weights, total = ray.get(publisher.publish.remote())
    hosts = ray.get([reader.host.remote() for reader in readers])
    before = ray.get(readers[0].received_bytes.remote())
    sums = ray.get([reader.load.remote(weights) for reader in readers])
    received = ray.get(readers[0].received_bytes.remote()) - before
    print(json.dumps({"hosts": hosts, "whole": sums == [total, total], "published": weights.num_bytes, "received": received}))


if __name__ == "__main__":
    main()
