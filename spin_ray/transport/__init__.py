"""How a published version gets into the samplers' engines: one file per way, found by its name (`weights.transport`).

| | who moves the bytes | what the engine does |
|---|---|---|
| object_store.py | Ray: once to every host, all replicas there map the same memory | reads them |
| nccl.py, gloo.py | a sender (sender.py) beside the learner's rank 0: once to every replica | is in a group with it (receiver.py) |

Every way begins with the same publication, buckets in the object store. So whoever cannot be sent to fetches the same bytes: a replica that
joins late, or one whose transfer has failed; and the main player trains on while a sender is at work, or hangs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from spin_ray.config import WeightsConfig
from spin_ray.records import PublishedWeights
from spin_ray.storage import Disk


class Transport(Protocol):
    """Each file's `Transport(weights)`; an instance serves one learner's worker or one sampler."""

    def prepare(self, *, log_path: str, env: Mapping[str, str], gpu: str) -> None:
        """On the learner's rank 0, before it publishes: start what takes long to start. `gpu`: see `placement.own_gpu`."""

    def sender(self) -> Any | None:
        """On the learner's rank 0: what `PublishedWeights.sender` is to be, of a publication."""

    def engine_settings(self) -> dict[str, Any]:
        """Of a sampler's engine, so that it can be loaded in this way."""

    async def load(self, engine: Any, weights: PublishedWeights, storage: Disk) -> float:
        """Bring a version into a sampler's engine; returns the seconds it took, waiting for answers under way not counted.

        Raises WeightsLost if it is gone, or WeightsLate, and the engine keeps what it has; TransferFailed if the process is to end.
        """

    async def serve(self, verb: str, arguments: Mapping[str, Any]) -> None:
        """Have the engine that is being loaded do what a sender asks."""


def transport_of(weights: WeightsConfig) -> Transport:
    return import_module(f"{__name__}.{weights.transport}").Transport(weights)
