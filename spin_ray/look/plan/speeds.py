"""How fast the players are: given, measured by an earlier run or probe, or assumed from FLOPs and a share of the device's peak."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median
from typing import Any

from spin_ray.config import Config
from spin_ray.config.values import flatten_dict
from spin_ray.look.plan.players import travels
from spin_ray.look.plan.rows import Texts
from spin_ray.look.plan.shapes import Shapes
from spin_ray.look.plan.sizes import GIB
from spin_ray.look.plan.times import Rate, Speeds

MFU, BANDWIDTH_SHARE = 0.35, 0.6
"""Assumed shares of what a device can do at most."""
SYNC_BYTES_PER_S = 0.5 * GIB
"""Assumed: weights from the learner through the object store into an engine."""


@dataclass(frozen=True)
class Device:
    """What a device can do at most, and how that is known."""

    name: str
    flops: float
    """Per second, in the dtype of the run."""
    bytes_per_s: float


GPUS = (
    (30, Device("an A10", 125e12, 0.6e12)), (50, Device("an A100 of 40 GB", 312e12, 1.56e12)),
    (100, Device("an A100 of 80 GB", 312e12, 2.04e12)), (1000, Device("an H200", 989e12, 4.8e12)),
)
"""Up to so many GiB the plan takes a GPU for this one, by NVIDIA's data sheets."""


def assumed_gpu(memory_gib: float) -> Device:
    return next(device for most, device in GPUS if memory_gib <= most)


def speeds_of(config: Config, shapes: Shapes, texts: Texts, device: Device, *, weight_bytes: int, found: dict[str, Rate]) -> Speeds:
    """`found`: rates that are known, by the names of `Speeds`; the others are assumed."""
    ranks = config.sampler.tensor_parallel_size
    share = f"MFU {MFU:g} on {device.name}"
    read = Rate(ranks * MFU * device.flops / (2 * _weights(shapes)), f"assumed: 2 FLOPs a weight, {share}")
    handed_over = Rate(travels(config, shapes) * weight_bytes / SYNC_BYTES_PER_S, "assumed: 0.5 GiB/s from the learner into an engine")
    return Speeds(
        learner=found.get("learner") or _learner(config, shapes, texts, device, share),
        sampler=found.get("sampler") or _sampler(config, shapes, texts, device, weight_bytes), scorer=read,
        sync=found.get("sync") or handed_over,
    )


def _weights(shapes: Shapes) -> float:
    return shapes.weights_per_token + shapes.model.head


def _learner(config: Config, shapes: Shapes, texts: Texts, device: Device, share: str) -> Rate:
    """A weight costs 2 FLOPs a token forward, 2 for what goes on to earlier layers, 2 for its own gradient, and 2 computed again."""
    per_weight = 4 + 2 * (config.lora.rank == 0) + 2 * config.learner.activation_checkpointing
    new, alone = config.sampler.max_new_tokens, config.method == "sft"
    answers = texts.answer + (0 if alone else texts.generated(new))
    weights = shapes.weights_per_token + shapes.model.head * min(1.0, answers / texts.pair(new, alone=alone))
    rate = config.learner.fewest * MFU * device.flops / (per_weight * weights)
    return Rate(rate, f"assumed: {per_weight} FLOPs a weight and token, {share}")


def _sampler(config: Config, shapes: Shapes, texts: Texts, device: Device, weight_bytes: int) -> Rate:
    """One step writes a token of every answer: it reads all weights and the answers' cache, or computes 2 FLOPs a weight and answer."""
    ranks, at_a_time = config.sampler.tensor_parallel_size, min(config.sampler.max_num_seqs, texts.num_prompts)
    cache = at_a_time * (texts.prompt + texts.generated(config.sampler.max_new_tokens) / 2) * shapes.kv_bytes(weight_bytes)
    reads = (_weights(shapes) * weight_bytes + cache) / (ranks * device.bytes_per_s * BANDWIDTH_SHARE)
    computes = 2 * _weights(shapes) * at_a_time / (ranks * MFU * device.flops)
    how = f"{at_a_time} answers at a time, {BANDWIDTH_SHARE:g} of the bandwidth of {device.name}"
    return Rate(at_a_time / max(reads, computes), f"assumed: {how}")


def from_earlier(config: Config, texts: Texts) -> dict[str, Rate]:
    """What an earlier run of this name measured, else its probe; nothing where there is neither."""
    return _of_run(config) or _of_probe(config, texts)


def _of_run(config: Config) -> dict[str, Rate]:
    path = config.run_path / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    saved = config.run_path / "config.json"
    before = flatten_dict(json.loads(saved.read_text())) if saved.exists() else {}
    replicas = before.get("sampler.num_replicas", 1)
    replicas = replicas["min"] if isinstance(replicas, dict) else replicas
    values = {
        "learner": median(_all(lines, "train/tokens_per_s")), "sync": median(_all(lines, "sync/total_s")),
        "sampler": max(_all(lines, "sampler/tokens_per_s")) / replicas,  # of the iteration that re-scored the least
    }
    return {name: Rate(value, f"measured: {path}") for name, value in values.items() if value}


def _all(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if key in line] or [0.0]


def _of_probe(config: Config, texts: Texts) -> dict[str, Rate]:
    path = config.run_path.with_name(f"{config.run.name}-probe") / "probe.json"
    if not path.exists():
        return {}
    told = json.loads(path.read_text())
    values = {
        "learner": told["pairs_per_s"] * texts.pair(config.sampler.max_new_tokens),
        "sampler": told["prompts_per_s"] * told["signs"]["generated_tokens"] / config.sampler.fewest,
    }
    return {name: Rate(value, f"measured: {path}") for name, value in values.items() if value}
