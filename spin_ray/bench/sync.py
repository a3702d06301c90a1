"""`bench sync`: weights from the learner to a sampler against the machine's own memcpy.

A real learner (Ray Train, DeepSpeed) publishes, a real sampler (vLLM) loads, about 1 GiB in float32. The yardstick is
np.copyto of as many bytes between two warm arrays of one process, in the same run. `--lora`: the same model once with all weights
trained, once with an adapter that travels, and once with an adapter that is merged first (`lora.sync`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spin_ray.bench.common import print_result
from spin_ray.chatter import captured_output
from spin_ray.config import load_config
from spin_ray.demo import resolve
from spin_ray.learner.coordinator import Base
from spin_ray.learner.group import Learner
from spin_ray.learner.messages import Publish
from spin_ray.manifest import RunDir
from spin_ray.model import inspect_model
from spin_ray.placement import Hardware
from spin_ray.records import Version
from spin_ray.sampler.pool import start_opponent
from spin_ray.system import ray_cluster
from spin_ray.theta import Thetas, thetas_of

SHAPES = {"few": (1024, 16), "many": (512, 76)}
"""Hidden size and layers of two models of the same size, one with many more parameters."""

LORA = {"full": (), "adapter": ("lora.rank=16", "lora.sync=adapter"), "merged": ("lora.rank=16", "lora.sync=merged")}
"""What travels -> settings."""

WARM_UP = 8
"""The store puts each version where it finds room: that many cycles until it comes back to pages that have been used (0.13 s for 1 s)."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench sync", description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers, for a quick try")
    parser.add_argument("--lora", action="store_true", help="compare what may travel of a model with an adapter")
    options = parser.parse_args(argv)
    if options.lora:
        found = {name: _measured("few", name, options, settings) for name, settings in LORA.items()}
        times = {f"{name}_s": round(each["publish_s"] + each["load_s"], 3) for name, each in found.items()}
        print_result({**times, **{f"{name}_mib": round(each["gib"] * 1024, 1) for name, each in found.items()}, "ways": found})
        return 0
    few, many = found = [_measured(name, name, options) for name in SHAPES]
    print_result({
        "gib": few["gib"], "cycle_gib_per_s": few["cycle_gib_per_s"], "memcpy_gib_per_s": few["memcpy_gib_per_s"],
        "share_of_memcpy": few["share_of_memcpy"], "rpcs": few["rpcs"], "rpcs_many_parameters": many["rpcs"],
        "models": dict(zip(SHAPES, found, strict=True)),
    })
    return 0


def _measured(shape: str, name: str, options: argparse.Namespace, settings: Sequence[str] = ()) -> dict[str, Any]:
    hidden, layers = SHAPES[shape]
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        save_random_model(Path(folder) / "model", hidden=hidden, layers=max(1, round(layers * options.scale)))
        found = measure(Path(folder), cycles=options.cycles, settings=settings)
    print(name, found, flush=True)
    return found


def save_random_model(folder: Path, *, hidden: int, layers: int) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:base"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=256, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    ))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: Path, *, cycles: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Median seconds of publish and of load over `cycles`, after WARM_UP that touch the object store's pages for the first time."""
    config, _ = load_config("conf/demo.yaml", [
        f"run.dir={folder}", "run.name=sync", f"model.path={folder / 'model'}", "learner.zero_stage=0", "sampler.max_num_seqs=8", *settings,
    ])
    run = RunDir.open(config)
    with captured_output(run.logs / "driver.log"), ray_cluster(config) as hardware:
        publish_s, load_s, weights = play(config, thetas_of(config, run, inspect_model(config)), hardware, cycles)
    memcpy = memcpy_rate(weights.num_bytes)
    gib = weights.num_bytes / 2**30
    cycle = gib / (publish_s + load_s)
    return {
        "gib": round(gib, 3), "publish_s": round(publish_s, 3), "load_s": round(load_s, 3),
        "publish_share_of_memcpy": round(gib / publish_s / memcpy, 3), "cycle_gib_per_s": round(cycle, 2),
        "memcpy_gib_per_s": round(memcpy, 2), "share_of_memcpy": round(cycle / memcpy, 3), "num_buckets": len(weights.buckets),
        # to the coordinator: post, result; to the pool: load; to the sampler: load; a put and a get per bucket
        "rpcs": 4 + 2 * len(weights.buckets),
    }


def play(config: Any, thetas: Thetas, hardware: Hardware, cycles: int) -> tuple[float, float, Any]:
    logs, theta = thetas.run.logs, thetas.first
    pool, _ = start_opponent(config, thetas.played(0), 0, hardware, max_model_len=64, logs=logs)
    learner = Learner(config, hardware, saved=theta, logs=logs)
    ray.get(pool.ready.remote())
    seconds = []
    for version in range(1, WARM_UP + cycles + 1):
        begun = time.perf_counter()
        number = learner.post(Publish(Version(version)))
        weights = learner.result(number)
        published = time.perf_counter()
        ray.get(pool.load.remote(weights))
        seconds.append((published - begun, time.perf_counter() - published))
        learner.move_base(Base(theta, None, number + 1, version), learner.group())  # as in a run: the version before goes
    learner.stop()
    publish_s, load_s = np.median(seconds[WARM_UP:], axis=0)
    return float(publish_s), float(load_s), weights


def memcpy_rate(num_bytes: int, repeats: int = 5) -> float:
    """GiB/s of copying `num_bytes` from one warm array into another."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - begun)
    return num_bytes / 2**30 / float(np.median(seconds))
