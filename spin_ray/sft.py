"""Supervised fine-tuning with the same learner: SPIN needs an SFT model to start from."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import ray

from spin_ray.chatter import captured_output
from spin_ray.config import Config
from spin_ray.data import load_train
from spin_ray.guard import Rollbacks
from spin_ray.interrupt import Interrupts
from spin_ray.learner.group import Learner, follow
from spin_ray.learner.messages import Divergence, Proved, Save, StepRecord, Train
from spin_ray.losses import sft_loss
from spin_ray.manifest import RunDir
from spin_ray.model import inspect_model, longest_sequence
from spin_ray.preflight import Proof, proof_pairs
from spin_ray.records import PAIR_SCHEMA, Pair, real_only, to_table
from spin_ray.system import ray_cluster
from spin_ray.terminal import Terminal
from spin_ray.tracking import Tracker


def run_sft(config: Config) -> None:
    """Train `model.path` on `data.train`; the model is written to runs/<name>/model."""
    run = RunDir.open(config, "sft")
    with run.locked(), captured_output(run.logs / "driver.log") as to_user:
        _train(config, run, Terminal(to_user))


def _train(config: Config, run: RunDir, terminal: Terminal) -> None:
    if run.marks("finished"):
        terminal.say(f"{run} is finished; the model is {run}/model")
        return
    interrupts = Interrupts()
    interrupts.listen()
    facts, proof = inspect_model(config), Proof()
    proof.end(config, facts, terminal.say)
    proof.tokens(config.data.train, config.data.split, config, facts.chat)
    if config.data.eval:
        terminal.say(f"data.eval={config.data.eval} is not read by sft; `spin-ray eval` measures a model on it")
    prompts, _ = load_train(config, facts.chat, terminal.say, terminal.status)
    longest_sequence(prompts, 0, facts)
    with ray_cluster(config, samplers=False) as hardware:
        interrupts.listen()
        learner = Learner(
            config, hardware, model_path=facts.path, logs=run.logs, rollbacks=len(run.marks("rollback")), storage=run.storage,
            proof_pairs=proof_pairs(prompts),
        )
        tracker = Tracker(config, run.path)
        ray.get(learner.coordinator.put_block.remote(0, 0, [ray.put(to_table([real_only(prompt, 0) for prompt in prompts], PAIR_SCHEMA))]))
        begun = time.monotonic()
        with tracker, terminal:
            number = learner.post(Train(
                iteration=0, block_sizes=(len(prompts),), num_epochs=config.sft.num_epochs,
                num_steps=config.num_steps(len(prompts), config.sft.num_epochs), loss_fn=sft_loss, normalizer=num_real_tokens,
                lr=config.sft.lr,
            ))
            rollbacks = Rollbacks(config, run, learner, tracker, terminal)
            note = functools.partial(_note, tracker, terminal, rollbacks, proof)
            follow(learner, number, note, interrupts)
            saved = learner.post(Save(str(run.path / "model")))
            follow(learner, saved, note, interrupts, patience_s=math.inf)
            run.storage.commit(run.path / "model")
        learner.stop()
    run.mark("finished")
    terminal.say(f"finished in {time.monotonic() - begun:.0f} s: the model is {run}/model")


def num_real_tokens(batch: list[Pair]) -> float:
    """SFT's normalizer: every answer token of a batch weighs the same."""
    return float(sum(len(pair.real_ids) for pair in batch))


def _note(tracker: Tracker, terminal: Terminal, rollbacks: Rollbacks, proof: Proof, record: Any) -> None:
    if isinstance(record, Proved):
        terminal.say(proof.line(record.facts, record.seconds))
    if isinstance(record, Divergence):
        rollbacks.answer(record)
    if not isinstance(record, StepRecord):
        return
    metrics, step, total = record.metrics, record.step, record.total_steps
    tracker.log("train", {**metrics, "global_step": step}, step=step)
    nll = metrics["real_nll_nats_per_token"]
    terminal.progress("main player", step + 1, total, f"step {step + 1}/{total}  NLL {nll:.3f}  {metrics['pairs_per_s']:.0f} examples/s")
