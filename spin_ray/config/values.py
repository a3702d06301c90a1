"""A config as plain values: to print, to save, to compare with the one that a run was begun with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields, is_dataclass
from typing import Any

from spin_ray.config.keys import scheduled
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


_ITERATIONS = "spin.num_iterations"


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
    now, then = (_decided(each) for each in (flatten(config), flatten(Config()) | flatten_dict(saved)))
    if now[_ITERATIONS] > (count := then[_ITERATIONS]):  # more of the same: what the iterations so far were made with must be the same
        now |= {_ITERATIONS: count} | {
            key: then[key] for key in _scheduled_keys(config) if _first(now[key], count) == _first(then[key], count)
        }
    keys = [key for key in sorted(now.keys() | then.keys()) if changes_result(key)]
    return [f"{key}: {then.get(key)} -> {now.get(key)}" for key in keys if now.get(key) != then.get(key)]


def _scheduled_keys(config: Config) -> list[str]:
    sections = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    return [f"{name}.{key}" for name, section in sections.items() if is_dataclass(section) for key in scheduled(section)]


def _first(value: Any, count: int) -> list[Any]:
    """A value, or a list of one per iteration, as the first iterations have it."""
    return value[:count] if isinstance(value, list) else [value] * count


def _decided(flat: dict[str, Any]) -> dict[str, Any]:
    """With what `auto` means to a result in place of the word."""
    return {**flat, "reference.scorer": decided_scorer(flat["reference.scorer"], flat["model.quantization"])}


def flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same of a config that was saved."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def to_json(config: Config) -> str:
    """The resolved config as indented JSON, for config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
