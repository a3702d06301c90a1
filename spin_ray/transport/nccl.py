"""From a GPU of the learner's straight into those of every replica: vLLM's own NCCL engine."""

from __future__ import annotations

from typing import Any

from spin_ray.transport.receiver import Receiver
from spin_ray.transport.sender import Backend


def _register() -> None:
    """vLLM knows it."""


def _trainer_info(**rendezvous: Any) -> Any:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(packed=True, **rendezvous)


class Transport(Receiver):
    backend = Backend("nccl", "cuda", _register, _trainer_info)
