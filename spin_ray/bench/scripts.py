"""`bench scripts`: the whole job against the script way, a fresh vLLM process and a fresh TRL process per iteration.

The same model, data, iterations, epochs, batch size, learning rate and loss; TRL without activation checkpointing (its
default costs it time here) and with its reference model. Both sides are timed from the start of the first process to the
end of the last one, without held-out evaluation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_ray.bench.common import print_result, run_command, run_spin
from spin_ray.config import Config, at, load_config
from spin_ray.demo import resolve
from spin_ray.methods import method_of
from spin_ray.nodes import Node
from spin_ray.placement import choose_hardware


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench scripts", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="conf/demo.yaml", help="its data.train must be a .jsonl file in messages format")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(argv)
    config, _ = load_config(options.config, options.overrides)
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        begun = time.perf_counter()
        run_spin(options.config, Path(folder) / "ours", [*options.overrides, "data.eval=''"])
        ours_s = time.perf_counter() - begun
        marks = [json.loads(line) for line in (Path(folder) / "ours/manifest.jsonl").read_text().splitlines()]
        stages = script_way(config, Path(folder))
    scripts_s = sum(stage["seconds"] for stage in stages)
    print_result({
        "ours_s": round(ours_s, 1), "scripts_s": round(scripts_s, 1), "ratio": round(scripts_s / ours_s, 2),
        "steps": [mark["report"]["num_steps"] for mark in marks if mark["stage"] == "iteration"], "script_stages": stages,
    })
    return 0


def script_way(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Play all iterations by scripts; returns each process's stage, iteration and wall seconds."""
    model, data, stages, method = resolve(config.model.path), resolve(config.data.train), [], method_of(config)
    for t in range(config.spin.num_iterations):
        settings = json.dumps(_settings(config, t))
        pairs, trained = folder / f"pairs_{t}.jsonl", folder / f"model_{t}"
        inputs = [folder / f"pairs_{k}.jsonl" for k in (*reversed(method.replayed(t)), t)]
        for stage, arguments in (("generate", (model, data, pairs, settings)), ("train", (model, trained, settings, *inputs))):
            begun = time.perf_counter()
            run_command("-m", "spin_ray.bench.script_way", stage, *arguments)
            stages.append({"stage": stage, "iteration": t, "seconds": round(time.perf_counter() - begun, 1)})
        model = str(trained)
    return stages


def _settings(config: Config, t: int) -> dict[str, Any]:
    import torch

    hardware, spin = choose_hardware(config, [Node("here", {"CPU": 1e6, "GPU": torch.cuda.device_count()})]), at(config.spin, t)
    return {
        "env": dict(hardware.sampler_env), "engine": dict(hardware.engine), "dtype": hardware.dtype, "cpu": hardware.device == "cpu",
        "max_model_len": config.data.max_prompt_tokens + max(config.data.max_answer_tokens, config.sampler.max_new_tokens),
        "max_new_tokens": config.sampler.max_new_tokens, "nll_weight": spin.nll_weight, "beta": spin.beta, "lr": spin.lr,
        "warmup_fraction": config.learner.warmup_fraction, "num_epochs": spin.num_epochs, "batch_pairs": config.learner.batch_pairs,
        "seed": config.run.seed,
    }
