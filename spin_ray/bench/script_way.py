"""SPIN as scripts, the way the official code and most blog posts do it: the yardstick of `bench scripts`.

    python -m spin_ray.bench.script_way generate MODEL DATA OUT.jsonl SETTINGS   a fresh vLLM answers every prompt
    python -m spin_ray.bench.script_way train MODEL OUT SETTINGS PAIRS.jsonl...  a fresh TRL DPOTrainer learns from the files

Text in files between them, chat template applied by each. SETTINGS is JSON, see `scripts.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def generate(model: str, data: str, out: str, settings: dict[str, Any]) -> None:
    os.environ.update(settings["env"])
    from vllm import LLM, SamplingParams

    rows = [json.loads(line)["messages"] for line in Path(data).read_text().splitlines()]
    llm = LLM(model=model, dtype=settings["dtype"], max_model_len=settings["max_model_len"], disable_log_stats=True, **settings["engine"])
    sampling = SamplingParams(temperature=1.0, max_tokens=settings["max_new_tokens"])
    outputs = llm.chat([messages[:-1] for messages in rows], sampling)
    pairs = [
        {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [{"role": "assistant", "content": output.outputs[0].text}]}
        for messages, output in zip(rows, outputs, strict=True)
    ]
    Path(out).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def train(model: str, out: str, settings: dict[str, Any], pairs: list[str]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for path in pairs for line in Path(path).read_text().splitlines()]
    nll = settings["nll_weight"]
    args = DPOConfig(
        output_dir=f"{out}.trainer", use_cpu=settings["cpu"], bf16=settings["dtype"] == "bfloat16", report_to=[], save_strategy="no",
        disable_tqdm=True, loss_type=["sigmoid", "sft"] if nll else ["sigmoid"], loss_weights=[1.0, nll] if nll else [1.0],
        beta=settings["beta"], learning_rate=settings["lr"], lr_scheduler_type="linear", warmup_steps=settings["warmup_fraction"],
        num_train_epochs=settings["num_epochs"], per_device_train_batch_size=settings["batch_pairs"], weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=False, seed=settings["seed"],
    )
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(out)
    print(f"steps {trainer.state.global_step}")


if __name__ == "__main__":
    if sys.argv[1] == "generate":
        generate(*sys.argv[2:5], json.loads(sys.argv[5]))
    else:
        train(*sys.argv[2:4], json.loads(sys.argv[4]), sys.argv[5:])
