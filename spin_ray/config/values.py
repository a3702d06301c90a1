"""A config as plain values: to print, to save, to compare with the one that a run was begun with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields, is_dataclass
from typing import Any

from spin_ray.config.schema import Config, decided_scorer

RESUME_MAY_CHANGE = (
    "preset", "data.num_processes", "eval.", "tracking.", "run.dir", "run.scratch", "run.keep_",
    "guard.on_divergence", "guard.max_", "guard.num_answers",
    "sampler.num_replicas", "sampler.tensor_parallel_size", "sampler.gpu", "sampler.cpus_per_replica", "sampler.max_num_seqs",
    "sampler.request_timeout_s", "sampler.heartbeat_timeout_s", "sampler.max_restarts", "sampler.restart_window_s",
    "learner.num_workers", "learner.gpus_per_worker", "learner.cpus_per_worker", "sampler.label_selector",
    "learner.label_selector", "learner.pack_tokens", "learner.activation_checkpointing",
    "learner.checkpoint_every_steps", "learner.max_restarts", "learner.compile", "placement.", "cluster.", "weights.",
)
"""Keys that say where and on what a run is computed, how it is followed, kept and given up: not what it computes, but for float noise.
Not among them: what DeepSpeed's checkpoints are made by (learner.zero_stage, offload_optimizer)."""


def changes_result(key: str) -> bool:
    """Whether a run with another value of this key computes something else."""
    return not key.startswith(RESUME_MAY_CHANGE)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, in the order of the dataclasses."""
    flat = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        flat |= flatten(value, f"{prefix}{entry.name}.") if is_dataclass(value) else {f"{prefix}{entry.name}": value}
    return flat


def differences(config: Config, saved: dict[str, Any]) -> list[str]:
    """What a run directory's config.json says otherwise: one "key: saved -> present" per key that changes the result.

    A key that it lacks was not there yet in the version that wrote it, and counts as its default.
    """
    now, then = (_decided(each) for each in (flatten(config), flatten(Config()) | _flatten_dict(saved)))
    keys = [key for key in sorted(now.keys() | then.keys()) if changes_result(key)]
    return [f"{key}: {then.get(key)} -> {now.get(key)}" for key in keys if now.get(key) != then.get(key)]


def _decided(flat: dict[str, Any]) -> dict[str, Any]:
    """With what `auto` means to a result in place of the word."""
    return {**flat, "reference.scorer": decided_scorer(flat["reference.scorer"], flat["model.quantization"])}


def _flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def to_json(config: Config) -> str:
    """The resolved config as indented JSON, for config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
