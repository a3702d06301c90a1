"""Whether the parts really work: Ray, an opponent's engine and a main player's step, each with the embedded model, in seconds."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from spin_ray.config import Config, LearnerConfig, SamplerConfig
from spin_ray.config.lora import LoraConfig
from spin_ray.demo import resolve
from spin_ray.look.checks import OK, Found, Subject, in_folder

_QUESTION = [{"role": "user", "content": "Count the tools: mouse, knife, grey, axe, file?"}]
_ANSWER, _OTHER = "There are three.", "There are two."
_ENGINE_SHARE = 0.1
"""Of a GPU's memory: enough for the embedded model, and others may be at work there."""


def ray_starts(subject: Subject) -> Iterator[Found]:
    """Ray as a run has it, and a task in it."""
    import ray

    from spin_ray.system import ray_cluster

    begun = time.monotonic()
    with ray_cluster(_toy(subject)):
        started = time.monotonic() - begun
        node = ray.get(ray.remote(num_cpus=0.1)(_host).remote(), timeout=60)
        how = f"joined {os.environ['RAY_ADDRESS']}" if subject.joins else "starts on this machine"
        yield Found(OK, f"{how} in {started:.0f} s; a task on {node} answered after {time.monotonic() - begun - started:.1f} s")


def _host() -> str:
    return socket.gethostname()


def vllm_answers(subject: Subject) -> Iterator[Found]:
    """A sampler as the pool starts it, with a few tokens of the embedded model."""
    with _computing(subject, samplers=True) as compute:
        yield Found(OK, compute(_sampled, str(subject.folder)))


def _sampled(hardware: Any, folder: str) -> str:
    from spin_ray.model import inspect_model
    from spin_ray.records import SamplingSettings, Saved, Version
    from spin_ray.sampler.actor import Sampler, SamplerArgs

    chat = inspect_model(_demo()).chat
    engine = {**hardware.engine, "max_num_seqs": 8, "enforce_eager": True}
    if "gpu_memory_utilization" in engine:
        engine["gpu_memory_utilization"] = _ENGINE_SHARE
    sampler = Sampler(SamplerArgs(
        saved=Saved(resolve("demo:sft")), version=Version(0), dtype=hardware.dtype, max_model_len=128, seed=0,
        log_path=f"{folder}/vllm.log", engine=engine, env=hardware.sampler_env,
    ))

    async def answered() -> Any:
        await sampler.ready()
        settings = SamplingSettings(0.0, 1.0, 16, tuple(sorted(chat.stop_ids)))
        [answer] = await sampler.sample(Version(0), [chat.prompt(_QUESTION)], settings)
        return answer

    answer = asyncio.run(answered())
    return f"answers {chat.decode(answer.token_ids)!r} on a {_device(hardware.sampler_gpus)}"


def deepspeed_steps(subject: Subject) -> Iterator[Found]:
    """A main player of one worker: a step on one pair, with the config's optimizer and ZeRO stage."""
    with _computing(subject, learner=True) as compute:
        yield Found(OK, compute(_stepped, subject.config.learner))


def _stepped(hardware: Any, learner: LearnerConfig) -> str:
    os.environ.update(hardware.learner_env)
    import numpy as np
    import torch.distributed as dist

    from spin_ray.learner.engine import MainPlayer
    from spin_ray.losses import PairObjective
    from spin_ray.model import inspect_model
    from spin_ray.records import Pair, Saved

    chat = inspect_model(_demo()).chat
    prompt, real = chat.encode(_QUESTION, _ANSWER)
    generated = chat.encode(_QUESTION, _OTHER)[1]
    ids = [np.array(each, np.int32) for each in (prompt, real, generated)]
    zeros = [np.zeros(len(each), np.float32) for each in ids[1:]]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group(hardware.torch_backend)
    player = MainPlayer(Saved(resolve("demo:sft")), learner, hardware)
    pairs = [Pair(0, 0, 0, 0, *ids, *zeros, "stop")]
    objective, losses = PairObjective(beta=0.1), []
    player.begin_iteration()
    references = player.score(pairs)[:, None]
    for _ in range(2):
        losses.append(player.step(pairs, references, objective=objective, lr=1e-3)["loss"])
    dist.destroy_process_group()
    if not losses[1] < losses[0]:
        raise RuntimeError(f"a step did not lower the loss: {losses[0]:.4f}, then {losses[1]:.4f}")
    how = f"on a {_device(hardware.learner_gpus)}, {learner.optimizer}, ZeRO stage {learner.zero_stage}"
    return f"steps {how}: loss {losses[0]:.4f}, then {losses[1]:.4f}"


@contextmanager
def _computing(subject: Subject, *, samplers: bool = False, learner: bool = False) -> Iterator[Any]:
    """Calls a function with the hardware: in this process, or on a cluster as a task that holds a player's devices."""
    from spin_ray.placement import choose_hardware

    config = _toy(subject)
    if not subject.joins:
        hardware = choose_hardware(config, [this_machine()], samplers=samplers, learner=learner)
        yield lambda function, *args: function(hardware, *args)
        return
    import ray

    from spin_ray.system import ray_cluster

    with ray_cluster(config, samplers=samplers, learner=learner) as hardware:
        gpus = hardware.sampler_gpus if samplers else hardware.learner_gpus
        task = ray.remote(num_gpus=gpus, num_cpus=0.5, max_retries=0, max_calls=1)  # its process has changed too much for another one
        yield lambda function, *args: ray.get(task(function).remote(hardware, *args))


def this_machine() -> Any:
    """As `ray_cluster` will tell Ray of it."""
    import torch

    from spin_ray.nodes import Node
    from spin_ray.system import MIN_LOCAL_CPUS

    cpus, count = max(os.cpu_count() or 1, MIN_LOCAL_CPUS), torch.cuda.device_count()
    return Node("this machine", {"CPU": float(cpus), **({"GPU": float(count)} if count else {})})


def _toy(subject: Subject) -> Config:
    """One small player of each kind; where and how they compute is the user's."""
    config = in_folder(_demo(), subject.folder)
    own = subject.config
    sampler = SamplerConfig(gpus_per_replica=own.sampler.gpus_per_replica and 1, label_selector=own.sampler.label_selector)
    learner = LearnerConfig(gpus_per_worker=own.learner.gpus_per_worker, label_selector=own.learner.label_selector)
    cluster = replace(own.cluster, wait_s=own.cluster.wait_s or 0)
    return replace(config, sampler=replace(sampler, num_replicas=1), learner=learner, cluster=cluster, lora=LoraConfig(),
                   model=replace(config.model, dtype=own.model.dtype))


def _demo() -> Config:
    config = Config()
    return replace(config, model=replace(config.model, path="demo:sft"), data=replace(config.data, train="demo:train"))


def _device(gpus: float) -> str:
    return "GPU" if gpus else "CPU"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
