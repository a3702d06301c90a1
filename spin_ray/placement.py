"""The one place that knows which hardware a run is on: resources, dtype, back ends and engine settings.

Everything else takes a `Hardware` and does not ask.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spin_ray.config import Config
from spin_ray.config.weights import DEVICES
from spin_ray.errors import BadInput
from spin_ray.nodes import Actors, Node, check_fit, total
from spin_ray.records import Devices

PLAY_TASK_CPUS = 0.1
"""A process of the play pipeline mostly waits for the samplers; it must fit beside the actors."""

BLOCKS_PER_PROCESS = 256

MEMORY_SHARE = 0.9
"""Of a GPU's memory, for an engine that is not told."""
SAMPLER_SHARE, LEARNER_SHARE = 0.6, 0.4
"""Of a GPU, as Ray counts, where both take turns on it: one of each fills it, and two of a kind never fit."""


@dataclass(frozen=True)
class Hardware:
    device: str
    """The learner's: "cuda" or "cpu"."""
    dtype: str
    """"bfloat16" or "float32": the weights as the sampler and the learner's forward pass see them."""
    sampler_gpus: float
    """GPUs of one sampler replica."""
    learner_gpus: float
    """GPUs of one learner worker."""
    audit_tolerance: float
    """Largest mean |difference| of sampler and learner log-probs per token, in nats."""
    share_prompt: bool
    """Whether the learner computes once what the answers of a pair have in common."""
    blocks_in_flight: int
    """Enough to keep every engine full twice over: a finished block takes a moment to be replaced."""
    torch_backend: str
    """Collectives of the learner's workers."""
    takes_turns: bool = False
    """Whether sampler and learner compute on the same devices, one of them at a time."""
    learner_first: bool = False
    """Whether the learner's workers go before all others that want the same cores."""
    actors: tuple[Actors, ...] = ()
    """What the cluster must have room for."""
    beside_players: tuple[Actors, ...] = ()
    """Those of them that are no players."""
    logits_elements: int = 12 * 2**20
    """Logits that the learner's output layer holds at a time: small keeps a CPU's memory low, large keeps a GPU busy."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the vLLM engine. A memory share of None is decided where the GPU is seen (sampler/actor.py): players take turns on it."""
    sampler_env: Mapping[str, str] = field(default_factory=dict)
    learner_env: Mapping[str, str] = field(default_factory=dict)


def learner_goes_first(config: Config, *, num_gpus: int, samplers: bool, learner: bool) -> bool:
    """On a machine that the run has for itself: where players fill two cores, the small processes around them cost the main player a fifth.

    With evaluation the samplers need that time: the main player would save it only to wait for them.
    """
    overlap = config.overlap.mode != "sequential" and config.placement.mode != "shared"
    return samplers and learner and not num_gpus and overlap and not (config.data.eval or config.eval.tasks)


def choose_hardware(
    config: Config, nodes: Sequence[Node], *, samplers: bool = True, learner: bool = True, learner_first: bool = False,
    may_grow: bool = False,
) -> Hardware:
    """Decide from what the cluster's nodes have, or refuse at once what could never start.

    `samplers` and `learner` say which players the command starts; `may_grow`, that nodes may still come: then nothing is too small.

    Raises BadInput naming the actors that do not fit, and the sum or the nodes.
    """
    sampler, num_gpus = config.sampler, total(nodes, "GPU")
    wants_gpus = [sampler.gpus_per_replica] * samplers + [config.learner.gpus_per_worker] * learner
    if may_grow and not num_gpus and None in wants_gpus:
        raise BadInput(
            "the cluster has no GPU yet, and nodes may still come: say whether the players want GPUs, with sampler.gpus_per_replica and "
            "learner.gpus_per_worker (0: they compute on CPUs)"
        )
    on_gpus = num_gpus > 0
    num_replicas, num_workers = sampler.fewest * samplers, config.learner.fewest * learner
    sampler_gpus: float = sampler.tensor_parallel_size * on_gpus if sampler.gpus_per_replica is None else sampler.gpus_per_replica
    learner_gpus: float = config.learner.gpus_per_worker if config.learner.gpus_per_worker is not None else int(on_gpus)
    if sampler_gpus not in (0, sampler.tensor_parallel_size) or (sampler_gpus == 0 and sampler.tensor_parallel_size > 1):
        raise BadInput(
            f"sampler.gpus_per_replica={sampler_gpus} does not go with sampler.tensor_parallel_size={sampler.tensor_parallel_size}; "
            "a replica takes as many GPUs as share its model"
        )
    takes_turns = samplers and learner and _takes_turns(config, num_gpus, sampler_gpus, learner_gpus, may_grow=may_grow)
    if takes_turns and config.learner.is_elastic:
        raise BadInput(
            f"learner.num_workers={config.learner.num_workers} does not go with players that take turns (placement.mode=shared): the "
            "samplers would wait for devices that come and go; give one number"
        )
    if takes_turns and sampler_gpus:
        sampler_gpus, learner_gpus = SAMPLER_SHARE, LEARNER_SHARE
    if samplers and learner:
        _check_transport(config.weights.transport, sampler_gpus, learner_gpus, takes_turns=takes_turns)
    blocks_in_flight = 2 * sampler.most * samplers * -(-sampler.max_num_seqs // sampler.block_prompts) + 1
    players = [
        Actors("sampler", num_replicas, {"GPU": sampler_gpus, "CPU": sampler.cpus_per_replica}, sampler.label_selector),
        Actors("learner", num_workers, {"GPU": learner_gpus, "CPU": config.learner.cpus_per_worker}, config.learner.label_selector),
    ]
    beside = (Actors("play process", play_processes(blocks_in_flight), {"CPU": PLAY_TASK_CPUS}),)
    actors = (*players, *beside)
    if not may_grow:
        if takes_turns and sampler_gpus:  # one of each on every GPU
            for player in players:
                check_fit(nodes, [replace(player, each={**player.each, "GPU": 1})])
        check_fit(nodes, actors)
    dtype = config.model.dtype if config.model.dtype != "auto" else ("bfloat16" if sampler_gpus and learner_gpus else "float32")
    tolerance = config.audit.tolerance or {"float32": 1e-3, "bfloat16": 0.05}[dtype]
    gpu_engine: dict[str, Any] = {"gpu_memory_utilization": sampler.gpu_memory_utilization or (None if takes_turns else MEMORY_SHARE)}
    if takes_turns:
        gpu_engine["enable_sleep_mode"] = True
    cpu_env = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1",
    }
    return Hardware(
        device="cuda" if learner_gpus else "cpu", dtype=dtype, sampler_gpus=sampler_gpus, learner_gpus=learner_gpus,
        audit_tolerance=tolerance, share_prompt=config.learner.share_prompt, actors=actors, beside_players=beside,
        blocks_in_flight=blocks_in_flight,
        torch_backend="nccl" if learner_gpus else "gloo", learner_first=learner_first, takes_turns=takes_turns,
        logits_elements=(256 if learner_gpus else 12) * 2**20, engine=gpu_engine if sampler_gpus else {"enforce_eager": True},
        sampler_env={"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **({} if sampler_gpus else cpu_env)},
        learner_env={} if learner_gpus else {"DS_ACCELERATOR": "cpu"},
    )


def _takes_turns(config: Config, num_gpus: float, sampler_gpus: float, learner_gpus: float, *, may_grow: bool) -> bool:
    """Raises BadInput where it is asked for and cannot be."""
    mode = config.placement.mode
    if mode == "shared" and (sampler_gpus or learner_gpus) and (sampler_gpus, learner_gpus) != (1, 1):
        raise BadInput(
            f"placement.mode=shared does not go with {sampler_gpus:g} GPUs for a sampler and {learner_gpus:g} for a learner's worker: "
            "one of each takes turns on one GPU; leave sampler.tensor_parallel_size, sampler.gpus_per_replica and "
            "learner.gpus_per_worker as they are, or set placement.mode=separate"
        )
    if mode == "shared" and config.sampler.label_selector != config.learner.label_selector:
        raise BadInput("placement.mode=shared wants the same sampler.label_selector and learner.label_selector: both use the same GPUs")
    return mode == "shared" or (mode == "auto" and num_gpus == sampler_gpus == learner_gpus == 1 and not may_grow)


def _check_transport(transport: str, sampler_gpus: float, learner_gpus: float, *, takes_turns: bool) -> None:
    name, device = f"weights.transport={transport}", DEVICES[transport]
    if device and takes_turns:
        raise BadInput(f"{name} does not go with players that take turns on the same devices; set weights.transport=object_store")
    if (device == "GPU" and not (sampler_gpus and learner_gpus)) or (device == "CPU" and (sampler_gpus or learner_gpus)):
        raise BadInput(
            f"{name} wants both players on {device}s, and here a sampler has {sampler_gpus:g} GPUs, a learner's worker {learner_gpus:g}; "
            "set weights.transport=object_store"
        )


def nodes_of_cluster() -> list[Node]:
    """Of the cluster that this process has joined."""
    import ray

    return [Node(node["NodeManagerAddress"], node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def free_of_cluster() -> list[Node]:
    """The same nodes with what no actor and no placement group holds."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return [
        Node(node["NodeManagerAddress"], free.get(node["NodeID"], {}), node["Labels"]) for node in ray.nodes() if node["Alive"]
    ]


def beside_driver() -> dict[str, Any]:
    """Options of an actor that nothing replaces: it is on the driver's node, so no other node's end is the run's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)}


def own_devices() -> Devices:
    """GPUs that Ray has given to this process."""
    import ray

    return tuple((ray.get_runtime_context().get_node_id(), int(number)) for number in ray.get_gpu_ids())


def own_gpu(hardware: Hardware) -> str:
    """What CUDA_VISIBLE_DEVICES must be in a process that is to use this worker's GPU; empty on a CPU."""
    if hardware.device == "cpu":
        return ""
    import torch

    visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.current_device()
    return visible.split(",")[index] if visible else str(index)


def play_processes(blocks_in_flight: int) -> int:
    """Processes of the play pipeline, each with its share of the blocks in flight."""
    return -(-blocks_in_flight // BLOCKS_PER_PROCESS)
