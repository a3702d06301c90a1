"""Held-out evaluation of one opponent version, with the sampler itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from spin_ray.chat import ChatFormat
from spin_ray.chatter import captured_output
from spin_ray.config import Config
from spin_ray.data import load_prompts
from spin_ray.errors import BadInput
from spin_ray.model import inspect_model, longest_sequence
from spin_ray.records import Completion, Prompt, SamplingSettings, Version
from spin_ray.sampler.pool import EVALUATE, sampling_settings, start_opponent
from spin_ray.system import ray_cluster


def run_eval(config: Config) -> None:
    """The command `eval`: metrics of `model.path` on `data.eval`, as one JSON object on standard output."""
    if not config.data.eval:
        raise BadInput("data.eval is not set; eval needs held-out data")
    logs = config.run_path / "logs"
    with captured_output(logs / "eval.log") as to_user:
        facts = inspect_model(config)
        prompts, counts = load_prompts(config.data.eval, config.data, facts.chat, seed=config.run.seed, limit=config.data.max_eval_prompts)
        max_model_len = longest_sequence(prompts, config.sampler.max_new_tokens, facts)
        with ray_cluster(config, learner=False) as hardware:
            pool = start_opponent(config, facts.path, 0, hardware, max_model_len=max_model_len, logs=logs)
            pool.release.remote(Version(0))
            metrics = evaluate(pool, Version(0), prompts, facts.chat, sampling_settings(config, facts.chat))
        print(json.dumps({"model": facts.path, "num_prompts": len(prompts), "rows": counts, **metrics}), file=to_user)


def evaluate(pool: Any, version: Version, prompts: Sequence[Prompt], chat: ChatFormat, settings: SamplingSettings) -> dict[str, float]:
    """Sample (temperature 1 and greedy) and score every held-out prompt.

    `real_nll_nats_per_token` is the real answers' negative log-likelihood over all their tokens. The exact-match shares are
    over the prompts with a checkable answer, and missing if there are none.
    """
    questions, real = [p.prompt_ids for p in prompts], [p.real_ids for p in prompts]
    at_one = pool.sample.remote(version, questions, dataclasses.replace(settings, temperature=1.0, top_p=1.0), EVALUATE)
    greedy = pool.sample.remote(version, questions, dataclasses.replace(settings, temperature=0.0, top_p=1.0), EVALUATE)
    drawn, best, logps = ray.get([at_one, greedy, pool.score.remote(version, questions, real, EVALUATE)])
    return measure(prompts, drawn, best, logps, chat.decode)


def measure(
    prompts: Sequence[Prompt], drawn: Sequence[Completion], greedy: Sequence[Completion], real_logps: Sequence[np.ndarray],
    decode: Callable[[np.ndarray], str],
) -> dict[str, float]:
    """The metrics of `evaluate` from what the sampler returned."""
    metrics = {
        "real_nll_nats_per_token": -float(np.concatenate(real_logps).mean()),
        "generated_tokens": float(np.mean([len(c.token_ids) for c in drawn])),
        "real_tokens": float(np.mean([len(p.real_ids) for p in prompts])),
        "truncated_share": float(np.mean([c.finish_reason == "length" for c in drawn])),
        "same_as_real_share": float(np.mean([np.array_equal(c.token_ids, p.real_ids) for c, p in zip(drawn, prompts, strict=True)])),
    }
    checkable = [k for k, prompt in enumerate(prompts) if prompt.answer is not None]
    if checkable:
        for name, completions in (("t1", drawn), ("greedy", greedy)):
            right = [decode(completions[k].token_ids).strip() == prompts[k].answer.strip() for k in checkable]
            metrics[f"exact_match_{name}_share"] = float(np.mean(right))
    return metrics
