"""One contestant of the learner bench, in a process of its own: `python -m spin_ray.bench.contestants FOLDER NAME`.

FOLDER holds the model, the pairs and bench.json (Settings). Before every optimizer step the process waits for a line on
its standard input; after the step it answers with a line of JSON: `{"seconds": ..., "loss": ..., "peak_gib": ...}`.
So the parent decides whose turn it is, and a contestant that waits takes no CPU.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from spin_ray.bench.workload import ADAPTER, load_pairs
from spin_ray.exchange.adapters import WEIGHTS
from spin_ray.learner.meters import peak_resident_gib
from spin_ray.losses import PairObjective
from spin_ray.records import Pair, Saved, opponent_reference


@dataclass(frozen=True)
class Settings:
    """What is the same for every contestant, and how each is set up."""

    device: str
    dtype: str
    batch_pairs: int
    """Pairs of one optimizer step."""
    optimizer: str
    """adamw or rmsprop, with torch's defaults and no weight decay."""
    lr: float
    beta: float
    grad_clip: float
    checkpointing: bool
    """Activation checkpointing of ours and of trl_best; trl has its default."""
    pack_tokens: int
    """Ours: token budget of a micro-batch."""
    trl_batch: int
    """trl: pairs of one forward pass; its default is 8."""
    trl_best_batch: int
    lora_rank: int = 0
    """0: all weights are trained; else an adapter of this rank, the same for every contestant, of all layers below the output layer."""


class Turns:
    """Waits for the parent and reports to it; everything else that is printed goes to the log."""

    def __init__(self, device: str):
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._cuda = device == "cuda"
        self._begun = 0.0

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit("the parent is gone")
        self._begun = self._now()

    def report(self, loss: float, **more: float) -> None:
        seconds = self._now() - self._begun
        self._out.write(json.dumps({"seconds": seconds, "loss": loss, "peak_gib": self._peak_gib(), **more}) + "\n")

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak_gib(self) -> float:
        """Peak of the whole process: resident memory with all imports on the CPU, memory held by torch on a GPU."""
        if self._cuda:
            return torch.cuda.max_memory_reserved() / 2**30
        return peak_resident_gib()


def ours(folder: Path, settings: Settings, batches: list[list[Pair]], turns: Turns) -> None:
    import torch.distributed as dist

    from spin_ray.config import LearnerConfig
    from spin_ray.learner.engine import MainPlayer
    from spin_ray.placement import Hardware

    cuda = settings.device == "cuda"
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    config = LearnerConfig(
        zero_stage=0, optimizer=settings.optimizer, grad_clip=settings.grad_clip, batch_pairs=settings.batch_pairs,
        pack_tokens=settings.pack_tokens, activation_checkpointing=settings.checkpointing,
    )
    hardware = Hardware(settings.device, settings.dtype, 0, int(cuda), 1e-3, True, 1, backend)
    player = MainPlayer(Saved(str(folder / "model"), str(folder / ADAPTER) if settings.lora_rank else None), config, hardware)
    player.begin_iteration()
    objective = PairObjective(settings.beta)
    for batch in batches:
        turns.wait()
        references = np.array([[opponent_reference(pair)] for pair in batch])
        metrics = player.step(batch, references, objective=objective, lr=settings.lr)
        turns.report(metrics["loss"], mfu=metrics.get("mfu", 0.0))
    dist.destroy_process_group()


def naive(folder: Path, settings: Settings, batches: list[list[Pair]], turns: Turns) -> None:
    """One answer at a time without padding, answer log-probs in checkpointed chunks of 256 tokens, no reference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, settings.dtype)).to(settings.device)
    if settings.lora_rank:
        from peft import PeftModel

        PeftModel.from_pretrained(model, folder / ADAPTER, is_trainable=True)  # changes the model itself
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    kind = {"adamw": functools.partial(torch.optim.AdamW, weight_decay=0.0), "rmsprop": torch.optim.RMSprop}[settings.optimizer]
    optimizer = kind([parameter for parameter in model.parameters() if parameter.requires_grad], lr=settings.lr)
    for batch in batches:
        turns.wait()
        total = 0.0
        for pair in batch:
            real, generated = (_naive_logp(model, pair.prompt_ids, answer) for answer in (pair.real_ids, pair.generated_ids))
            known = [float(a.sum(dtype=np.float64)) for a in (pair.opponent_real_logps, pair.opponent_generated_logps)]
            margin = settings.beta * ((real - known[0]) - (generated - known[1]))
            loss = torch.nn.functional.softplus(-margin) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        turns.report(total)


def _naive_logp(model: Any, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    from torch.utils.checkpoint import checkpoint

    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64)).to(model.device)
    hidden = model.base_model(ids[None, :-1], use_cache=False).last_hidden_state[0, len(prompt) - 1 :]

    def chunk_logp(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(model.lm_head(hidden).float(), -1).gather(1, targets[:, None]).sum()

    parts = zip(hidden.split(256), ids[len(prompt) :].split(256), strict=True)
    return torch.stack([checkpoint(chunk_logp, *part, use_reentrant=False) for part in parts]).sum()


def trl(folder: Path, settings: Settings, batches: list[list[Pair]], turns: Turns) -> None:
    """TRL's defaults; only what must be equal for all (batch, optimizer, learning rate, dtype, order) is set."""
    _train_with_trl(folder, settings, batches, turns, per_device=settings.trl_batch)


def trl_best(folder: Path, settings: Settings, batches: list[list[Pair]], turns: Turns) -> None:
    """TRL's fastest settings: precomputed references (not timed), no checkpointing where it fits, and of each batch the
    pairs of like length together, so that the least is padded.
    """
    batches = [sorted(batch, key=lambda p: len(p.prompt_ids) + max(len(p.real_ids), len(p.generated_ids))) for batch in batches]
    _train_with_trl(
        folder, settings, batches, turns, per_device=settings.trl_best_batch, precompute_ref_log_probs=True,
        gradient_checkpointing=settings.checkpointing,
    )


def _train_with_trl(
    folder: Path, settings: Settings, batches: list[list[Pair]], turns: Turns, *, per_device: int, **options: Any
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[torch.Tensor] = []

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset  # it already has the token ids

        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            turns.report(torch.stack(losses).mean().item())
            losses.clear()
            if state.global_step < len(batches):
                turns.wait()

    rows = [
        {"prompt_ids": p.prompt_ids.tolist(), "chosen_ids": p.real_ids.tolist(), "rejected_ids": p.generated_ids.tolist()}
        for batch in batches for p in batch
    ]
    cuda = settings.device == "cuda"
    args = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=not cuda, bf16=settings.dtype == "bfloat16", report_to=[], save_strategy="no",
        disable_tqdm=True, loss_type="sigmoid", beta=settings.beta, learning_rate=settings.lr, lr_scheduler_type="constant",
        max_grad_norm=settings.grad_clip, weight_decay=0.0, num_train_epochs=1, train_sampling_strategy="sequential",
        per_device_train_batch_size=per_device, gradient_accumulation_steps=settings.batch_pairs // per_device,
        **({} if settings.optimizer == "adamw" else {"optim": "rmsprop"}), **options,
    )
    peft = {}
    if settings.lora_rank:
        from peft import PeftConfig

        peft = {"peft_config": PeftConfig.from_pretrained(str(folder / ADAPTER))}
        peft["peft_config"].inference_mode = False  # with it, as in files, nothing would be trained
    trainer = Tokenised(
        model=str(folder / "model"), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[TakeTurns()], **peft,
    )
    if settings.lora_rank:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(trainer.model, load_file(folder / ADAPTER / WEIGHTS))  # else it has drawn its own
    trainer.train()


CONTESTANTS: dict[str, Callable[[Path, Settings, list[list[Pair]], Turns], None]] = {
    "ours": ours, "trl": trl, "trl_best": trl_best, "naive": naive,
}


def main(folder: Path, name: str) -> None:
    settings = Settings(**json.loads((folder / "bench.json").read_text()))
    turns = Turns(settings.device)
    pairs = load_pairs(folder / "pairs.parquet")
    batches = [pairs[start : start + settings.batch_pairs] for start in range(0, len(pairs), settings.batch_pairs)]
    torch.manual_seed(0)
    CONTESTANTS[name](folder, settings, batches, turns)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
