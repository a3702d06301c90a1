"""`bench learner`: our step beside TRL's DPOTrainer and beside a naive loop, on the same pairs, in one run.

Every contestant is a process of its own (contestants.py), so that a peak of memory is its own: on the CPU the largest
resident size of the whole process with all that it imports, nothing subtracted. They take turns step by step, so that a
busy machine slows all of them; on a GPU, where their memory would add up, they run one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from spin_ray.errors import BadInput, RunStopped

CPU_MODEL, GPU_MODELS = "small", ("qwen3-0.6b", "llama-3.2-1b", "zephyr-7b")


def main(argv: Sequence[str]) -> int:
    """Run the bench; prints a table and, as the last line, one JSON object. Raises BadInput for options that do not fit."""
    options = _parse(argv)
    models = options.model or ([CPU_MODEL] if options.device == "cpu" else list(GPU_MODELS))
    summaries = {}
    for model in models:
        with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
            results = run(Path(folder), model, options)
        print(_table(model, results), flush=True)
        summaries[model] = _summary(results, options)
    print(json.dumps(next(iter(summaries.values())) if len(models) == 1 else summaries))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="spin-ray bench learner", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", action="append", help="shape of the model, may be repeated: tiny, small, " + ", ".join(GPU_MODELS))
    parser.add_argument("--contestants", default="ours,trl,trl_best,naive")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps, after one that is not timed")
    parser.add_argument("--batch-pairs", type=int, default=16)
    parser.add_argument("--pack-tokens", type=int, help="our token budget of a micro-batch")
    parser.add_argument("--trl-batch", type=int, default=8, help="pairs of one forward pass of trl; 8 is its default")
    parser.add_argument("--trl-best-batch", type=int, help="the same for trl_best")
    parser.add_argument("--optimizer", choices=("adamw", "rmsprop"), help="adamw on the CPU, rmsprop on a GPU")
    parser.add_argument("--lora", type=int, nargs="?", const=16, default=0, metavar="RANK", help="train an adapter, of rank 16 by default")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for key in ("trl_batch", "trl_best_batch"):
        if getattr(options, key) and options.batch_pairs % getattr(options, key):
            raise BadInput(f"--batch-pairs {options.batch_pairs} does not divide by --{key.replace('_', '-')} {getattr(options, key)}")
    return options


def _settings(model: str, options: argparse.Namespace) -> Any:
    from spin_ray.bench.contestants import Settings

    cuda = options.device == "cuda"
    return Settings(
        device=options.device, dtype="bfloat16" if cuda else "float32", batch_pairs=options.batch_pairs,
        optimizer=options.optimizer or ("rmsprop" if cuda else "adamw"), lr=1e-5 if cuda else 1e-4, beta=0.1, grad_clip=1.0,
        checkpointing=options.checkpointing or model == "zephyr-7b", pack_tokens=options.pack_tokens or (16_384 if cuda else 448),
        trl_batch=options.trl_batch, trl_best_batch=options.trl_best_batch or (8 if cuda else 1), lora_rank=options.lora,
    )


def run(folder: Path, model: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Write the workload into `folder` and let the contestants take their steps; name -> what it did (`Result` as a dict)."""
    from spin_ray.bench import workload

    if model not in workload.SHAPES:
        raise BadInput(f"--model {model}: choose from {', '.join(workload.SHAPES)}")
    settings = _settings(model, options)
    workload.save_model(folder / "model", model, seed=options.seed)
    if options.lora:
        workload.save_adapter(folder, rank=options.lora, seed=options.seed)
    pairs = workload.random_pairs(
        (options.steps + 1) * settings.batch_pairs, vocab_size=workload.SHAPES[model]["vocab_size"], seed=options.seed
    )
    workload.save_pairs(folder / "pairs.parquet", workload.with_references(pairs, folder / "model", device=options.device))
    (folder / "bench.json").write_text(json.dumps(asdict(settings)))
    batches = [pairs[start : start + settings.batch_pairs] for start in range(0, len(pairs), settings.batch_pairs)]
    names = options.contestants.split(",")
    groups = [names] if options.device == "cpu" else [[name] for name in names]
    steps = {name: each for group in groups for name, each in take_turns(folder, group, options.steps + 1, settings.device).items()}
    return {name: _result(each, batches) for name, each in steps.items()}


def _result(steps: list[dict[str, float]], batches: list[list[Any]]) -> dict[str, Any]:
    """Median rates of the timed steps; tokens count the prompt once per answer and no padding, for every contestant alike.

    The median, because on a machine that others use a step now and then takes many times as long.
    """
    tokens = [sum(2 * len(p.prompt_ids) + len(p.real_ids) + len(p.generated_ids) for p in batch) for batch in batches]
    timed = list(zip(steps, batches, tokens, strict=True))[1:]
    return {
        "pairs_per_s": median(len(batch) / step["seconds"] for step, batch, _ in timed),
        "tokens_per_s": median(count / step["seconds"] for step, _, count in timed),
        "peak_gib": steps[-1]["peak_gib"], "losses": [step["loss"] for step in steps], "mfu": steps[-1].get("mfu"),
    }


def take_turns(folder: Path, names: list[str], num_steps: int, device: str) -> dict[str, list[dict[str, float]]]:
    processes: dict[str, subprocess.Popen[str]] = {}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for number in range(num_steps):
            for name in names:
                if name not in processes:  # each starts up alone: ours measures what the device can do
                    processes[name] = _start(folder, name, device)
                steps[name].append(_one_step(processes[name], name, folder))
                print(f"{name:9} step {number}  {steps[name][-1]['seconds']:8.2f} s  loss {steps[name][-1]['loss']:.6f}", file=sys.stderr)
    finally:
        for process in processes.values():
            process.stdin.close()
            process.kill()
            process.wait()
    return steps


def _start(folder: Path, name: str, device: str) -> subprocess.Popen[str]:
    env = {
        **os.environ, "HF_HUB_OFFLINE": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0", "TOKENIZERS_PARALLELISM": "false", **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}),
    }
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "spin_ray.bench.contestants", str(folder), name], env=env, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )


def _one_step(process: subprocess.Popen[str], name: str, folder: Path) -> dict[str, float]:
    try:
        process.stdin.write("\n")
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise RunStopped(f"{name} ended early; its last words:\n" + (folder / f"{name}.log").read_text()[-3000:])
    return json.loads(answer)


def _summary(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """The JSON of the last line; what a contestant that did not run would say is left out."""
    summary: dict[str, float] = {}
    mine = results.get("ours")
    for name, key in (("trl", "ratio"), ("trl_best", "ratio_best"), ("naive", "ratio_naive")):
        summary |= {f"{who}_pairs_per_s": results[who]["pairs_per_s"] for who in ("ours", name) if who in results}
        if mine and name in results:
            summary[key] = mine["pairs_per_s"] / results[name]["pairs_per_s"]
    summary |= {f"{who}_peak_gib": results[who]["peak_gib"] for who in ("ours", "trl") if who in results}
    if mine and "trl" in results:
        summary["memory_ratio"] = mine["peak_gib"] / results["trl"]["peak_gib"]
        summary["loss_difference"] = max(abs(a - b) for a, b in zip(mine["losses"], results["trl"]["losses"], strict=True))
    return summary


def _table(model: str, results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{model:12}  pairs/s  tokens/s  peak GiB    MFU  losses"]
    for name, result in results.items():
        mfu = f"{result['mfu']:6.1%}" if result["mfu"] else "     –"
        losses = " ".join(f"{loss:.5f}" for loss in result["losses"])
        lines.append(f"{name:12} {result['pairs_per_s']:8.2f} {result['tokens_per_s']:9.0f} {result['peak_gib']:9.2f} {mfu}  {losses}")
    return "\n".join(lines)
