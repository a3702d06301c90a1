"""All of a plan in one object: what a run needs, whether it fits, how long it takes and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from spin_ray.config import Config
from spin_ray.families import longest_exact, text_part
from spin_ray.look.plan.advice import Change, changes
from spin_ray.look.plan.inputs import Asked, Inputs, read_inputs
from spin_ray.look.plan.machine import Machine, hardware_of, machine_of
from spin_ray.look.plan.players import CONTEXT_BYTES, Learner, Sampler, learner_of, sampler_of
from spin_ray.look.plan.rows import Texts
from spin_ray.look.plan.shapes import Shapes, read_shapes
from spin_ray.look.plan.sizes import GIB
from spin_ray.look.plan.speeds import from_earlier, speeds_of
from spin_ray.look.plan.times import Iteration, Job, Rate, Speeds, iterations
from spin_ray.methods import method_of
from spin_ray.model import ModelFacts, longest_sequence
from spin_ray.placement import Hardware


@dataclass(frozen=True)
class Fit:
    """How one GPU of a size, or the machine where there is none, is filled."""

    memory: float
    """Bytes."""
    separate: Sampler
    shared: Sampler
    fits: bool
    changes: list[Change]
    """That make the learner fit; empty if it does."""


@dataclass(frozen=True)
class Plan:
    """Everything that is told."""

    config: Config
    inputs: Inputs
    machine: Machine
    hardware: Hardware
    shapes: Shapes
    learner: Learner
    fits: list[Fit]
    speeds: Speeds
    job: Job
    iterations: list[Iteration]
    price: float | None

    @property
    def wall_s(self) -> float:
        return sum(one.wall_s for one in self.iterations)

    @property
    def num_gpus(self) -> float:
        """That the run holds."""
        on_gpus = [kind for kind in self.hardware.actors if kind.each.get("GPU")]
        if self.hardware.takes_turns:  # one of each on a GPU
            return max((kind.number for kind in on_gpus), default=0)
        return sum(kind.number * kind.each["GPU"] for kind in on_gpus)

    def as_json(self) -> dict[str, Any]:
        """Numbers for another program: bytes, seconds, tokens per second."""
        learner = {"peak_gib": self.learner.peak / GIB, "parts_gib": {part.name: part.num_bytes / GIB for part in self.learner.parts}}
        return {
            "device": self.hardware.device, "dtype": self.hardware.dtype, "takes_turns": self.hardware.takes_turns,
            "num_gpus": self.num_gpus,
            "parameters": self.shapes.model.total, "trained": self.shapes.model.trained, "texts": asdict(self.inputs.texts),
            "learner": learner, "fits": [{"memory_gib": one.memory / GIB, "fits": one.fits} for one in self.fits],
            "changes": {f"{one.memory / GIB:g}": [asdict(change) for change in one.changes] for one in self.fits},
            "speeds": asdict(self.speeds), "iterations": [asdict(one) for one in self.iterations], "wall_s": self.wall_s,
            "gpu_hours": self.num_gpus * self.wall_s / 3600, "measured_on_a_gpu": False,
        }


def make_plan(config: Config, asked: Asked, *, base: float | None = None) -> Plan:
    """`base`: bytes of the learner's process before it knows a model, where it is not the worker of a run.

    Starts nothing. Raises BadInput for what a run would refuse, and for numbers that are neither there nor given.
    """
    machine = machine_of(config, asked)
    hardware = hardware_of(config, machine)
    inputs = read_inputs(config, asked)
    _check_positions(config, inputs)
    shapes = _shapes(config, hardware, inputs)
    texts, speeds = inputs.texts, _speeds(config, hardware, shapes, inputs.texts, machine, asked)
    job = _job(config, hardware, texts)
    return Plan(
        config, inputs, machine, hardware, shapes, learner_of(config, hardware, shapes, texts, base=base),
        [_fit(config, hardware, inputs, memory) for memory in machine.memories], speeds, job, iterations(job, speeds),
        asked.price_per_gpu_hour,
    )


def _check_positions(config: Config, inputs: Inputs) -> None:
    """Raise BadInput, as a run would, for a model that is too short for what it is to read and write."""
    positions = getattr(text_part(inputs.model), "max_position_embeddings", None)
    samplers = method_of(config).plays or bool(config.data.eval)
    facts = ModelFacts(inputs.path, None, "", positions, inputs.model, longest_exact=longest_exact(inputs.model))
    longest_sequence(inputs.texts.longest, config.sampler.max_new_tokens if samplers else 0, facts)


def _shapes(config: Config, hardware: Hardware, inputs: Inputs) -> Shapes:
    lora = replace(config.lora, rank=inputs.adapter_rank or config.lora.rank)
    return read_shapes(inputs.path, inputs.model, lora, dtype=hardware.dtype, in_4_bits=bool(config.model.quantization))


def _fit(config: Config, hardware: Hardware, inputs: Inputs, memory: float) -> Fit:
    def peak(changed: Config) -> float:
        return learner_of(changed, hardware, _shapes(changed, hardware, inputs), inputs.texts).peak

    shapes = _shapes(config, hardware, inputs)
    sides = [sampler_of(config, hardware, shapes, inputs.texts, memory=memory, shared=shared) for shared in (False, True)]
    room = _room(config, hardware, memory, sides[0])
    return Fit(memory, *sides, fits=peak(config) <= room, changes=list(changes(config, peak, room=room)))


def _room(config: Config, hardware: Hardware, memory: float, sampler: Sampler) -> float:
    """Bytes for one rank of the learner: of a GPU, or of a machine that holds all players."""
    if hardware.device == "cuda":
        return memory - CONTEXT_BYTES
    return (memory - num_replicas(hardware) * sampler.on_cpu()) / config.learner.fewest


def num_replicas(hardware: Hardware) -> int:
    """That are started."""
    return sum(kind.number for kind in hardware.actors if kind.who == "sampler")


def _speeds(config: Config, hardware: Hardware, shapes: Shapes, texts: Texts, machine: Machine, asked: Asked) -> Speeds:
    known = from_earlier(config, texts)
    for name, value in (("learner", asked.learner_tokens_per_s), ("sampler", asked.sampler_tokens_per_s)):
        known |= {name: Rate(value, "given")} if value else {}
    return speeds_of(config, shapes, texts, machine.device, weight_bytes=2 if hardware.dtype == "bfloat16" else 4, found=known)


def _job(config: Config, hardware: Hardware, texts: Texts) -> Job:
    method = method_of(config)
    epochs = [method.num_epochs(t) for t in range(method.num_iterations)]
    return Job(
        texts.num_prompts, texts.prompt, texts.answer, texts.generated(config.sampler.max_new_tokens), epochs,
        config.spin.replay if method.plays else 0, texts.num_eval, config.sampler.fewest, plays=method.plays, alone=config.method == "sft",
        overlap=config.overlap.mode != "sequential" and not hardware.takes_turns, scorer=method.scorer,
    )
