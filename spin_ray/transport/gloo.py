"""From the learner's host into every replica's engine over torch's gloo: the way of nccl.py where there are only CPUs."""

from __future__ import annotations

from typing import Any

from spin_ray.transport.receiver import Receiver
from spin_ray.transport.sender import Backend

NAME = "gloo"


def _register() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory

    module = "spin_ray.transport.gloo_engine"
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, module, "GlooEngine")
        WeightTransferTrainerFactory.register_engine(NAME, module, "GlooTrainer")


def _trainer_info(**rendezvous: Any) -> Any:
    from spin_ray.transport.gloo_engine import GlooTrainerInfo

    return GlooTrainerInfo(packed=True, **rendezvous)


class Transport(Receiver):
    backend = Backend(NAME, "cpu", _register, _trainer_info)
