"""Folders of runs that were never played, with all that a real one marks, measures and keeps: for what reads runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from spin_ray.config import load_config, to_json
from spin_ray.demo import resolve
from spin_ray.exchange.pairs import write_table
from spin_ray.heldout import OF_BEFORE, as_pairs, quality
from spin_ray.manifest import RunDir
from spin_ray.records import NO_LOGPS, PAIR_SCHEMA, Completion, Prompt, Span, Version, to_table
from spin_ray.timeline import Timeline
from spin_ray.tokenizer import load_tokenizer


def tokenizer():
    return load_tokenizer(resolve("demo:sft"), False)[0]


def made_run(
    folder: Path, name: str = "made", *overrides: str, texts: tuple[str, ...] = ("1 2 3", "4 5 6"), versions: int = 3, right: float = 0.4,
    finished: bool = True, heldout: bool = True, steps: int = 20, seed: int = 0,
) -> RunDir:
    """A run of the demo's config with so many versions, theta_0 among them; `texts`: prompts and answers are cut from these."""
    config, _ = load_config("conf/demo.yaml", [f"run.dir={folder}", f"run.name={name}", f"spin.num_iterations={max(1, versions - 1)}", *overrides])
    run, rng = RunDir(config.run_path), np.random.default_rng(seed)
    run.logs.mkdir(parents=True)
    (run.path / "config.json").write_text(to_json(config))
    run.mark("session", started=1.7e9, config={}, packages={"torch": "2.13.0", "vllm": "0.32.0"}, revision="abc", python="3.11", template="t" * 64, model="demo:sft", hardware={"device": "cpu", "dtype": "float32"})
    run.mark("prepared", block_sizes=[8], lengths={"num_prompts": 8}, sha256="p" * 64, train={"rows": 9, "kept": 8, "dropped_bad": 1}, heldout={"rows": 8, "kept": 8})
    run.mark("theta_0", sha256="w" * 64)
    lines, spans = [], []
    for t in range(versions - 1):
        for step in range(steps):
            stamp = {"time": 1.7e9 + t * 100 + step, "iteration": t, "step": step, "opponent_version": t}
            lines.append({**stamp, "train/global_step": t * steps + step, "train/pair_loss": 0.69 - 0.01 * step, "train/margin": 0.1 * step, "train/accuracy": 0.5 + step / 100, "train/lr": 1e-4})
        lines.append({"time": 1.7e9 + t * 100 + 99, "iteration": t, "opponent_version": t + 1, "iteration/last_epoch_accuracy": 0.8, "iteration/last_epoch_displaced_share": 0.1})
        begin = 1.7e9 + 100.0 * t
        spans += [Span("main player", "train", t, begin + 20, begin + 90), Span("main player", "publish", t, begin + 90, begin + 92), Span("main player", "save", t, begin + 92, begin + 97), Span("opponent 0", "play", t, begin, begin + 60), Span("opponent 0", "evaluate", t, begin + 60, begin + 80)]
        run.mark("iteration", iteration=t, model=str(run.model(t)), opponent="demo:sft" if not t else str(run.model(t - 1)), pairs={"new": 8, "sha256": "a" * 64}, lr=1e-4, num_epochs=1, seed=0, session=1, objective={"name": "PairObjective", "beta": 0.1}, sampling={"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48}, report={"num_steps": steps, "wall_s": 70.0, "waited_s": 3.0})
    if spans:
        Timeline(run.path).add(spans)
    if heldout:
        _evaluate(run, rng, texts, versions, right)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if versions > 1:
        run.name_best(str(run.model(versions - 2)))
    if finished:
        run.mark("finished")
    return run


def _evaluate(run, rng, texts, versions, right):
    encode = lambda text: np.array(tokenizer()(text, add_special_tokens=False)["input_ids"], np.int32)  # noqa: E731
    ids = [encode(text) for text in texts] * 4
    prompts = [Prompt(k, each, ids[(k + 1) % len(ids)], "x") for k, each in enumerate(ids)]
    for version in range(versions):
        answers = [ids[(k + 1 + version) % len(ids)] for k in range(len(ids))]
        drawn = [Completion(Version(version), each, -rng.random(len(each)).astype(np.float32), "stop") for each in answers]
        pairs = as_pairs(version, prompts, drawn, [-rng.random(len(p.real_ids)).astype(np.float32) for p in prompts])
        pairs = [replace(pair, finish_reason="stop") for pair in pairs]
        told = rng.random(len(pairs)) < right + 0.1 * version
        metrics = quality(pairs, told, told)
        if version:
            metrics |= {"advantage_accuracy": 0.7, "advantage_accuracy_se": 0.02, "kl_from_start_nats_per_token": 0.1 * version, "kl_from_opponent_nats_per_token": 0.1, "exact_match_t1_change_share": 0.1 * version, "exact_match_t1_change_share_se": 0.01, "real_nll_change_nats_per_token": -0.05, "real_nll_change_nats_per_token_se": 0.01}
        before = [ids[(k + version) % len(ids)] for k in range(len(ids))]
        of_before = [-rng.random(len(each)).astype(np.float32) if version else NO_LOGPS for each in before]
        table = to_table(pairs, PAIR_SCHEMA).append_column(OF_BEFORE, pa.array(of_before, pa.list_(pa.float32())))
        write_table(run.heldout_answers(version), table)
        run.mark("evaluation", version=version, metrics=metrics)
