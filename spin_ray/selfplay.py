"""Self-play fine-tuning: the loop of Algorithm 1 (arXiv 2401.01335), overlapped, resumable.

    prompts ──► play (Ray Data tasks ⇄ sampler pool) ──► blocks on disk ──► coordinator ──► learner workers
                     ▲                                                                          │
                     └──── pool.load ◄── published weights (object store) ◄── end of iteration ─┘

| who is faster | what happens |
|---|---|
| opponent | runs on to the end of the iteration, then evaluates and idles; its blocks wait in the object store, which spills |
| main player | waits for the next block in order (`waited_s`); from iteration 1 on the replay blocks keep it busy first |
| storage | a block counts only when it is on disk, so a slow disk slows both players and loses nothing |
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from spin_ray.background import in_background
from spin_ray.chatter import captured_output
from spin_ray.config import Config
from spin_ray.data import counted, load_prompts
from spin_ray.errors import BadInput
from spin_ray.evaluation import evaluate
from spin_ray.exchange.audit import Audit, allowed_first_loss_deviation, compare
from spin_ray.exchange.pairs import PlayPlan, blocks_of_iteration, play, stream_to_learner, write_prompts, write_table
from spin_ray.learner.group import Learner, follow
from spin_ray.learner.loop import Publish, Save, Score, Train, TrainReport, WorkerArgs
from spin_ray.losses import LOSS_AT_ZERO, spin_loss
from spin_ray.manifest import RunDir, readable_disk_errors, written_whole
from spin_ray.model import ModelFacts, inspect_model, longest_sequence
from spin_ray.placement import Hardware
from spin_ray.records import PROMPT_SCHEMA, Prompt, from_table, real_only, to_table
from spin_ray.sampler.pool import sampling_settings, start_opponent
from spin_ray.system import ray_cluster
from spin_ray.terminal import Terminal
from spin_ray.tracking import Tracker


def run_spin(config: Config) -> None:
    """Play all iterations of a run, going on where an earlier one stopped; returns when the run is finished."""
    run = RunDir.open(config, "run")
    with run.locked(), captured_output(run.logs / "driver.log") as to_user:
        _run(config, run, Terminal(to_user))


def _run(config: Config, run: RunDir, terminal: Terminal) -> None:
    last_model = run.model(config.spin.num_iterations - 1)
    if run.marks("finished"):
        terminal.say(f"{run.path} is finished; the model is {last_model}")
        return
    facts = inspect_model(config)
    prepared = prepare(config, run, facts, terminal)
    max_model_len = longest_sequence(prepared.train + prepared.heldout, config.sampler.max_new_tokens, facts)
    with ExitStack() as stack:
        hardware = stack.enter_context(ray_cluster(config))
        blocks = len(prepared.block_sizes)
        terminal.say(f"{run.path}: {len(prepared.train)} prompts in {blocks} blocks, {hardware.device}, {hardware.dtype}; starting")
        players = stack.enter_context(start_players(config, run, facts, hardware, max_model_len, terminal))
        with Tracker(config, run.path) as tracker, terminal:
            SelfPlay(config, run, facts, prepared, hardware, players, tracker, terminal).play()
    terminal.say(f"finished: the model is {last_model}")


@dataclass(frozen=True)
class Prepared:
    """The data as token ids."""

    train: list[Prompt]
    heldout: list[Prompt]
    block_sizes: list[int]


def prepare(config: Config, run: RunDir, facts: ModelFacts, terminal: Terminal) -> Prepared:
    """Tokenise once; a resumed run reads what the first one wrote."""
    marks = run.marks("prepared")
    if marks:
        sizes = marks[0]["block_sizes"]
        train = [prompt for index in range(len(sizes)) for prompt in from_table(pq.read_table(run.prompts(index)), Prompt)]
        return Prepared(train, from_table(pq.read_table(run.heldout()), Prompt), sizes)
    data = config.data
    train, counts = load_prompts(data.train, data, facts.chat, seed=config.run.seed, limit=data.max_prompts)
    heldout, heldout_counts = [], {}
    if data.eval:
        heldout, heldout_counts = load_prompts(data.eval, data, facts.chat, seed=config.run.seed, limit=data.max_eval_prompts)
    terminal.say(counted(data.train, counts))
    if data.eval:
        terminal.say(counted(data.eval, heldout_counts))
    sizes = write_prompts(run, train, config.sampler.block_prompts)
    write_table(run.heldout(), to_table(heldout, PROMPT_SCHEMA))
    run.mark("prepared", block_sizes=sizes, train=counts, heldout=heldout_counts)
    return Prepared(train, heldout, sizes)


@dataclass(frozen=True)
class Players:
    pool: Any
    """Actor handle of the SamplerPool."""
    learner: Learner


@contextmanager
def start_players(
    config: Config, run: RunDir, facts: ModelFacts, hardware: Hardware, max_model_len: int, terminal: Terminal
) -> Iterator[Players]:
    """Start opponent and main player side by side from the newest finished version."""
    version = len(run.marks("iteration"))
    model_path = str(run.model(version - 1)) if version else facts.path
    # In float32 the exported model is exact; a bfloat16 one lacks its float32 masters.
    checkpoint = run.checkpoint(version - 1) if version and hardware.dtype == "bfloat16" else None
    if checkpoint and not checkpoint.exists():
        raise BadInput(f"{checkpoint}: the checkpoint of the last finished iteration is gone; put it back, or start a new run")
    pool = start_opponent(config, model_path, version, hardware, max_model_len=max_model_len, logs=run.logs)
    learner = Learner(
        WorkerArgs(
            coordinator=None, model_path=model_path, checkpoint_path=str(checkpoint) if checkpoint else None,
            config=config.learner, hardware=hardware, trust_remote_code=config.model.trust_remote_code, seed=config.run.seed,
            log_dir=str(run.logs),
        ),
        storage=run.logs / "ray_train",
    )
    ready = pool.ready.remote()
    while not ray.wait([ready], timeout=60)[0]:
        terminal.say(f"still waiting for {config.sampler.num_replicas} sampler replicas; free resources: {ray.available_resources()}")
    ray.get(ready)
    yield Players(pool, learner)
    learner.stop()


class SelfPlay:
    """Algorithm 1. Version t is theta_t: the opponent of iteration t, and what iteration t - 1 made of the main player."""

    def __init__(
        self, config: Config, run: RunDir, facts: ModelFacts, prepared: Prepared, hardware: Hardware, players: Players,
        tracker: Tracker, terminal: Terminal,
    ):
        self._config, self._run, self._facts, self._prepared, self._hardware = config, run, facts, prepared, hardware
        self._pool, self._learner = players.pool, players.learner
        self._tracker, self._terminal = tracker, terminal
        self._settings = sampling_settings(config, facts.chat)
        self._last_metrics: dict[str, float] = {}

    def play(self) -> None:
        """All iterations that the manifest does not call finished."""
        config = self._config
        first = len(self._run.marks("iteration"))
        audit = self._audit(first)
        trained: dict[str, Any] = {}
        for t in range(first, config.spin.num_iterations):
            evaluation = in_background(self._evaluate, t, trained)
            generated = in_background(self._play_opponent, t)
            if config.overlap.mode == "sequential":
                generated.result()
            report = self._train(t, audit)
            generated.result()
            evaluation.result()
            audit, sync_s = self._become_opponent(t + 1)
            trained = self._finish_iteration(t, report, audit, sync_s)
        self._evaluate(config.spin.num_iterations, trained)
        self._run.mark("finished")

    def _play_opponent(self, t: int) -> None:
        """Lines 3-5: theta_t answers every prompt. Hands every block on as soon as it is finished."""
        config, begun = self._config, time.monotonic()
        blocks = blocks_of_iteration(t, self._prepared.block_sizes, replay=config.spin.replay)
        total, done, drawn = sum(block.size for block in blocks), 0, 0

        def note(table: pa.Table) -> None:
            nonlocal done, drawn
            done += len(table)
            fresh = table.column("opponent_version").to_pylist()[0] == t
            drawn += sum(len(ids) for ids in table.column("generated_ids")) if fresh else 0
            rate = drawn / (time.monotonic() - begun)
            self._terminal.progress("opponent", done, total, f"iteration {t}  pairs {done}/{total}  {rate:,.0f} tok/s")
            if done == total:
                self._tracker.log("sampler", {"play_s": time.monotonic() - begun, "tokens_per_s": rate}, iteration=t, opponent_version=t)
                self._log_examples(t, table)

        put_block = self._learner.coordinator.put_block
        plan = PlayPlan(self._run, self._pool, t, self._settings)
        try:
            tables = play(plan, blocks, self._hardware.play_tasks)
            stream_to_learner(tables, lambda index, reference: ray.get(put_block.remote(t, index, reference)), note)
        except BaseException as error:
            self._learner.fail(error)
            raise

    def _train(self, t: int, audit: Audit) -> TrainReport:
        """Line 6: theta_{t+1} = argmin over the pairs of iteration t (and t - 1)."""
        config, spin = self._config, self._config.spin
        blocks = blocks_of_iteration(t, self._prepared.block_sizes, replay=spin.replay)
        tokens_per_pair = 2 * float(np.mean([len(prompt.real_ids) for prompt in self._prepared.train]))
        deviation = allowed_first_loss_deviation(config.beta(t), audit, tokens_per_pair)
        number = self._learner.post(Train(
            iteration=t, block_sizes=tuple(block.size for block in blocks), num_epochs=spin.num_epochs,
            loss_fn=functools.partial(spin_loss, beta=config.beta(t), loss=spin.loss, nll_weight=spin.nll_weight),
            normalizer=len, lr=config.lr(t), shuffle_first_epoch=config.overlap.mode == "sequential", max_steps=config.run.max_steps,
            expected_first_loss=(LOSS_AT_ZERO[spin.loss], deviation),
        ))
        steps_before = sum(mark["report"]["num_steps"] for mark in self._run.marks("iteration"))
        return follow(self._learner, number, functools.partial(self._note_step, t, steps_before))

    def _note_step(self, t: int, steps_before: int, record: dict[str, Any]) -> None:
        metrics, step, total = record["metrics"], record["step"], record["total_steps"]
        if step % self._config.tracking.log_every_steps == 0 or step == total - 1:
            self._tracker.log("train", {**metrics, "global_step": steps_before + step}, iteration=t, step=step, opponent_version=t)
        text = f"iteration {t}  step {step + 1}/{total}  loss {metrics['loss']:.3f}  margin {metrics['margin']:.2f}  " \
               f"{metrics['pairs_per_s']:.0f} pairs/s  waited {metrics['waited_s']:.1f} s"
        self._last_metrics = metrics
        self._terminal.progress("main player", step + 1, total, text)

    def _become_opponent(self, version: int) -> tuple[Audit, float]:
        """theta_{t+1} becomes the opponent: durable on disk first, then in the samplers, then audited."""
        run, t = self._run, version - 1
        with readable_disk_errors(run.iteration(t)), written_whole(run.model(t)) as model, written_whole(run.checkpoint(t)) as checkpoint:
            publish = self._learner.post(Publish(version))
            save = self._learner.post(Save(str(model), str(checkpoint)))
            weights = self._learner.result(publish)
            begun = time.monotonic()
            seconds = max(ray.get(self._pool.load.remote(weights)))
            sync_s = time.monotonic() - begun
            self._learner.result(save)
        gib_per_s = weights.num_bytes / 2**30 / max(seconds, 1e-9)
        self._tracker.log("sync", {"load_s": seconds, "total_s": sync_s, "gib_per_s": gib_per_s}, opponent_version=version)
        return self._audit(version), sync_s

    def _audit(self, version: int) -> Audit:
        """Sampler and learner score the same real answers."""
        probe = self._prepared.train[: self._config.audit.num_prompts]
        number = self._learner.post(Score(tuple(real_only(prompt, version) for prompt in probe)))
        sampler = ray.get(self._pool.score.remote(version, [p.prompt_ids for p in probe], [p.real_ids for p in probe]))
        learner = self._learner.result(number)[::2]
        audit = compare(version, sampler, learner, self._hardware.audit_tolerance)
        self._tracker.log("audit", {"mean_abs_logp_difference_nats": audit.mean_nats, "max_abs_logp_difference_nats": audit.max_nats},
                          opponent_version=version)
        return audit

    def _finish_iteration(self, t: int, report: TrainReport, audit: Audit, sync_s: float) -> dict[str, Any]:
        facts = {"pairs_per_s": report.num_pairs / report.wall_s, "tokens_per_s": report.num_tokens / report.wall_s, "sync_s": sync_s}
        self._tracker.log("iteration", {**asdict(report), **facts}, iteration=t, opponent_version=t + 1)
        self._run.mark("iteration", iteration=t, report=asdict(report), audit=asdict(audit))
        if t > 0 and self._run.checkpoint(t - 1).exists():  # only the newest is ever used
            shutil.rmtree(self._run.checkpoint(t - 1))
        last = self._last_metrics
        return {"loss": last["loss"], "margin": last["margin"], "train_s": report.wall_s, "waited_s": report.waited_s}

    def _evaluate(self, version: int, trained: dict[str, Any]) -> None:
        """Held-out metrics of theta_version; runs beside the play of iteration `version`."""
        marks = {mark["version"]: mark["metrics"] for mark in self._run.marks("evaluation")}
        metrics = marks.get(version, {})
        if self._prepared.heldout and not metrics:
            metrics = evaluate(self._pool, version, self._prepared.heldout, self._facts.chat, self._settings)
            self._tracker.log("eval", metrics, opponent_version=version)
            self._run.mark("evaluation", version=version, metrics=metrics)
        self._terminal.row({"model": f"theta_{version}" if version else "SFT", **metrics, **trained})

    def _log_examples(self, t: int, table: pa.Table) -> None:
        texts = ("prompt_ids", "real_ids", "generated_ids")
        rows = [[t, *(self._facts.chat.decode(row[name]) for name in texts)] for row in table.slice(0, 8).to_pylist()]
        self._tracker.table("pairs", ["iteration", "prompt", "real", "generated"], rows)
