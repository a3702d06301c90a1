"""`bench sampler`: an opponent's engine alone, with every prompt computed once and with every prompt computed twice.

Each round has new random prompts and answers of fixed lengths, and plays them both ways with the same engine, one after the other:
`play` (an answer drawn and a given one scored by one call, which share the prompt), and `sample` beside `score`. The prefix cache is
emptied between.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from spin_ray.bench.common import print_result
from spin_ray.bench.workload import SHAPES, save_model

Way = Callable[[Any, Sequence[np.ndarray], np.ndarray, Any], tuple[float, np.ndarray]]
"""(engine, prompts, answers, settings) -> seconds, log-probs of the given answers [num_prompts, num_answer_tokens]."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench sampler", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="small", help="shape of the model, with random weights")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--answer-tokens", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=64, help="of a round; all are asked at once")
    parser.add_argument("--rounds", type=int, default=7, help="timed ones, after one that is not timed")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="play with an adapter")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        print_result(run(Path(folder), options))
    return 0


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds; `max_difference_nats`: of a log-prob, between the two ways."""
    from spin_ray.records import SamplingSettings

    engine = _engine(folder, options)
    settings = SamplingSettings(1.0, 1.0, options.answer_tokens, ())
    rng, took, differences = np.random.default_rng(0), {name: [] for name in WAYS}, []
    for number in range(options.rounds + 1):
        words = rng.integers(3, SHAPES[options.model]["vocab_size"], (options.prompts, options.prompt_tokens + options.answer_tokens))
        prompts, answers = np.split(words, [options.prompt_tokens], axis=1)
        scores = {}
        for name in sorted(WAYS, reverse=bool(number % 2)):
            seconds, scores[name] = WAYS[name](engine, prompts, answers, settings)
            engine.forget_prompts().result()
            if number:
                took[name].append(seconds)
        differences.append(float(np.abs(scores["once"] - scores["twice"]).max()))
        print(f"round {number}: " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in took.items() if each), file=sys.stderr)
    engine.close()
    rates = {f"{name}_pairs_per_s": round(options.prompts / median(each), 2) for name, each in took.items()}
    ratio = median(twice / once for twice, once in zip(took["twice"], took["once"], strict=True))
    return {
        "ratio": round(ratio, 3), **rates, "prompt_tokens": options.prompt_tokens, "answer_tokens": options.answer_tokens,
        "model": options.model, "lora_rank": options.lora, "max_difference_nats": max(differences),
    }


def _engine(folder: Path, options: argparse.Namespace) -> Any:
    import torch

    from spin_ray.bench.workload import ADAPTER, save_adapter
    from spin_ray.config import Config
    from spin_ray.nodes import Node
    from spin_ray.placement import choose_hardware
    from spin_ray.records import Saved, Version

    save_model(folder / "model", options.model)
    if options.lora:
        save_adapter(folder, rank=options.lora)
    hardware = choose_hardware(Config(), [Node("here", {"CPU": 2, "GPU": float(torch.cuda.is_available())})], learner=False)
    os.environ.update(hardware.sampler_env)
    from spin_ray.sampler.engine import OpponentEngine

    return OpponentEngine(
        Saved(str(folder / "model"), str(folder / ADAPTER) if options.lora else None), version=Version(0), dtype=hardware.dtype,
        max_model_len=options.prompt_tokens + options.answer_tokens + 1, seed=0,
        settings={**hardware.engine, "max_num_seqs": Config().sampler.max_num_seqs},
    )


def once(engine: Any, prompts: Sequence[np.ndarray], answers: np.ndarray, settings: Any) -> tuple[float, np.ndarray]:
    begun = time.perf_counter()
    played = [engine.play(engine.version, prompt, settings, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    scores = np.stack([future.result()[1] for future in played])
    return time.perf_counter() - begun, scores


def twice(engine: Any, prompts: Sequence[np.ndarray], answers: np.ndarray, settings: Any) -> tuple[float, np.ndarray]:
    begun = time.perf_counter()
    drawn = [engine.sample(engine.version, prompt, settings) for prompt in prompts]
    scored = [engine.score(engine.version, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for future in drawn:
        future.result()
    scores = np.stack([future.result() for future in scored])
    return time.perf_counter() - begun, scores


WAYS: dict[str, Way] = {"once": once, "twice": twice}
