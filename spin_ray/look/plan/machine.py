"""Which devices the plan is for: this machine's, or those that are asked for. No cluster is joined."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from spin_ray.config import Config
from spin_ray.learner.meters import PEAK_FLOPS, peak_flops
from spin_ray.look.plan.inputs import Asked
from spin_ray.look.plan.sizes import GIB
from spin_ray.look.plan.speeds import Device, assumed_gpu
from spin_ray.methods import method_of
from spin_ray.nodes import Node, Selector
from spin_ray.placement import Hardware, choose_hardware

COMMON_GIB = (24.0, 40.0, 80.0)
"""Sizes of GPUs that are tried where none is there and none is given."""
CPU_BYTES_PER_S = 10e9
"""Assumed of a CPU's memory."""


@dataclass(frozen=True)
class Machine:
    num_gpus: int
    """Of the cluster that the plan is for."""
    memories: list[float]
    """Bytes of a GPU, or of the machine where the players are on CPUs: what is tried."""
    device: Device
    """For rates that nobody knows."""
    source: str
    """Where that is from, in words."""


def machine_of(config: Config, asked: Asked) -> Machine:
    """GPUs that are here, or that the flags or the config ask for; else this machine's CPUs."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    by_key = [config.sampler.gpus_per_replica, config.learner.gpus_per_worker]
    if 0 in by_key or not (here or asked.gpu_memory_gib or any(by_key)):
        return _cpus()
    wanted = config.sampler.fewest * config.sampler.tensor_parallel_size + config.learner.fewest * (config.learner.gpus_per_worker or 1)
    if given := asked.gpu_memory_gib:
        return Machine(wanted, [given * GIB], assumed_gpu(given), f"given: GPUs of {given:g} GiB, as many as are asked for")
    if here:
        memory, name = torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
        known = next((flops for key, flops in PEAK_FLOPS.items() if key in name), assumed_gpu(memory / GIB).flops)
        device = Device(f"{name}, which is here", known, assumed_gpu(memory / GIB).bytes_per_s)
        return Machine(max(here, wanted * (wanted > here)), [memory], device, f"measured: {here} × {name} here")
    sizes = ", ".join(f"{size:g}" for size in COMMON_GIB)
    source = f"no GPU here and none given: {sizes} GiB are tried"
    return Machine(wanted, [size * GIB for size in COMMON_GIB], assumed_gpu(COMMON_GIB[-1]), source)


def _cpus() -> Machine:
    memory, cores = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), os.cpu_count()
    flops = peak_flops(torch.device("cpu"), torch.float32)
    name = f"this machine's CPU ({cores} cores, {flops / 1e9:.0f} GFLOP/s in a matrix product)"
    source = f"measured: {cores} cores and {memory / GIB:.0f} GiB here, no GPU"
    return Machine(0, [float(memory)], Device(name, flops, CPU_BYTES_PER_S), source)


def hardware_of(config: Config, machine: Machine) -> Hardware:
    """As a cluster with room for everything would have it. Raises BadInput for what could never start."""
    selectors = [config.sampler.label_selector, config.learner.label_selector]
    different = selectors if selectors[0] != selectors[1] else selectors[:1]
    nodes = [Node("a node", {"GPU": machine.num_gpus, "CPU": 1e6}, _labels(selector)) for selector in different]
    return choose_hardware(config, nodes, samplers=method_of(config).plays or bool(config.data.eval))


def _labels(selector: Selector) -> dict[str, str]:
    """Of a node that it means."""
    return {label: _meant(wanted) for label, wanted in selector.items()}


def _meant(wanted: str) -> str:
    """Worked: a100 -> a100, in(a100,h100) -> a100, !a100 -> another."""
    if wanted.startswith("!"):
        return "another"
    return wanted[3:-1].split(",")[0].strip() if wanted.startswith("in(") else wanted
