"""What a Ray Train worker does: take the next command from the coordinator, let the main player carry it out, report.

Commands are plain messages. Every rank gets every command, and every pair: a rank picks its share of each global batch
by itself (packing.py), so the batches, and the model after them, do not depend on the number of workers.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from spin_ray.chatter import redirect_output
from spin_ray.config import LearnerConfig
from spin_ray.errors import RunStopped
from spin_ray.learner.coordinator import Failure
from spin_ray.manifest import readable_disk_errors
from spin_ray.placement import Hardware
from spin_ray.records import Pair, from_table


@dataclass(frozen=True)
class WorkerArgs:
    """What a worker needs to start."""

    coordinator: Any
    model_path: str
    checkpoint_path: str | None
    """DeepSpeed checkpoint of the same weights, for the fp32 masters of a bf16 run."""
    config: LearnerConfig
    hardware: Hardware
    trust_remote_code: bool
    seed: int
    log_dir: str


@dataclass(frozen=True)
class Train:
    """Train on an iteration's pairs; answers with a `TrainReport`."""

    iteration: int
    block_sizes: tuple[int, ...]
    """Pairs in each block, in the order in which the first epoch reads them."""
    num_epochs: int
    loss_fn: Any
    """(PairLogps) -> (loss [num_pairs], metrics)."""
    normalizer: Callable[[list[Pair]], float]
    """What a batch's summed loss is divided by: the number of its pairs, or of its tokens."""
    lr: float
    """Peak learning rate."""
    shuffle_first_epoch: bool
    """False: take the pairs of epoch 0 as their blocks come in. Later epochs are always shuffled."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0: no limit."""
    expected_first_loss: tuple[float, float] | None = None
    """(l(0), allowed deviation): policy and opponent are the same model at the first step (invariant 2)."""


@dataclass(frozen=True)
class TrainReport:
    num_steps: int
    num_pairs: int
    """Pairs trained on, epochs counted in."""
    num_tokens: int
    wall_s: float
    waited_s: float
    """Of wall_s, time without a finished block to train on."""
    first_loss: float
    peak_memory_gib: float


@dataclass(frozen=True)
class Score:
    """Compute the log-probs of the answers of these pairs; answers with two arrays per pair."""

    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Publish:
    """Put the weights into the object store; answers with PublishedWeights."""

    version: int


@dataclass(frozen=True)
class Save:
    """Write the HF folder and, if it has a path, the DeepSpeed checkpoint; the caller gives temporary names."""

    model_path: str
    checkpoint_path: str | None = None


@dataclass(frozen=True)
class Stop:
    pass


class FirstLossError(RunStopped):
    """The first loss of an iteration is not l(0): sampler and learner do not see the same model or tokens."""


def run_worker(loop_config: dict[str, WorkerArgs]) -> None:
    """The `train_loop_per_worker` of the one TorchTrainer."""
    import ray.train.torch
    import torch

    args = loop_config["args"]
    rank = ray.train.get_context().get_world_rank()
    redirect_output(f"{args.log_dir}/learner-{rank}.log")
    os.environ.update(args.hardware.learner_env)
    from spin_ray.learner.engine import MainPlayer  # DeepSpeed reads the environment when it is imported

    torch.manual_seed(args.seed)
    if args.hardware.device == "cuda":
        torch.cuda.set_device(ray.train.torch.get_device())
    player = MainPlayer(args.model_path, args.config, args.hardware, trust_remote_code=args.trust_remote_code)
    if args.checkpoint_path:
        player.load_checkpoint(Path(args.checkpoint_path))
    worker, number = Worker(player, args), 0
    while not isinstance(command := _get(args.coordinator.command.remote(number)), Stop):
        result = worker.carry_out(command)
        ray.train.report({"command": number})  # a barrier: every rank is done
        if player.rank == 0:
            ray.get(args.coordinator.answer.remote(number, result))
        number += 1


def _get(reference: Any) -> Any:
    value = ray.get(reference)
    if isinstance(value, Failure):
        raise value.error
    return value


class Worker:
    """Carries out commands with a MainPlayer."""

    def __init__(self, player: Any, args: WorkerArgs):
        self._player, self._args = player, args
        self._coordinator = args.coordinator

    def carry_out(self, command: Any) -> Any:
        match command:
            case Train():
                return self._train(command)
            case Score():
                return self._player.token_logps(command.pairs)
            case Publish():
                return self._publish(command)
            case Save():
                return self._save(command)
        raise TypeError(f"unknown command {command!r}")

    def _train(self, command: Train) -> TrainReport:
        self._player.begin_iteration()
        config, count, started = self._args.config, Counter(), time.perf_counter()
        feed = BlockFeed(self._coordinator, command.iteration, len(command.block_sizes))
        total_steps = num_steps(command, config.batch_pairs)
        first_loss = float("nan")
        for step, batch in enumerate(batches(feed, command, batch_pairs=config.batch_pairs, seed=self._args.seed)):
            if step == total_steps:
                break
            lr = learning_rate(step, total_steps, peak=command.lr, warmup_fraction=config.warmup_fraction)
            begun = time.perf_counter()
            metrics = self._player.step(batch, loss_fn=command.loss_fn, lr=lr, normalizer=command.normalizer(batch))
            seconds = time.perf_counter() - begun
            count.update(steps=1, pairs=len(batch), tokens=metrics["num_tokens"])
            if step == 0:
                first_loss = metrics.get("spin_loss", metrics["loss"])
                _check_first_loss(first_loss, command)
            self._log(command.iteration, step, total_steps, {
                **metrics, "lr": lr, "pairs_per_s": len(batch) / seconds, "tokens_per_s": metrics["num_tokens"] / seconds,
                "waited_s": feed.waited_s,
            })
        return TrainReport(
            count["steps"], count["pairs"], count["tokens"], time.perf_counter() - started, feed.waited_s, first_loss, _peak_memory_gib()
        )

    def _log(self, iteration: int, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        if self._player.rank == 0:
            ray.get(self._coordinator.log.remote({"iteration": iteration, "step": step, "total_steps": total_steps, "metrics": metrics}))

    def _publish(self, command: Publish) -> Any:
        from spin_ray.exchange.weights import BUCKET_BYTES, PublishedWeights, to_bucket

        buckets, num_bytes = [], 0
        for tensors in self._player.weights(BUCKET_BYTES):
            if tensors:
                bucket = to_bucket(tensors)
                num_bytes += bucket.data.nbytes
                buckets.append(ray.put(bucket))
        return PublishedWeights(command.version, tuple(buckets), num_bytes, self._player.tied_names)

    def _save(self, command: Save) -> None:
        from spin_ray.exchange.weights import BUCKET_BYTES

        with readable_disk_errors(Path(command.model_path)):
            self._player.export(Path(command.model_path), BUCKET_BYTES)
            if command.checkpoint_path:
                self._player.save_checkpoint(Path(command.checkpoint_path))


class BlockFeed:
    """An iteration's blocks in order, asked for one ahead; knows how long it had to wait for them."""

    def __init__(self, coordinator: Any, iteration: int, num_blocks: int):
        self._coordinator, self._iteration, self._num_blocks = coordinator, iteration, num_blocks
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[list[Pair]]:
        asked = [self._ask(0)]
        for index in range(self._num_blocks):
            if index + 1 < self._num_blocks:
                asked.append(self._ask(index + 1))
            begun = time.perf_counter()
            table: pa.Table = ray.get(_get(asked.pop(0))[0])
            self.waited_s += time.perf_counter() - begun
            yield from_table(table, Pair)

    def _ask(self, index: int) -> Any:
        return self._coordinator.block.remote(self._iteration, index)


def num_steps(command: Train, batch_pairs: int) -> int:
    """Optimizer steps of an iteration: every epoch ends with a batch of its own, however small."""
    steps = command.num_epochs * -(-sum(command.block_sizes) // batch_pairs)
    return min(steps, command.max_steps or steps)


def batches(blocks: Any, command: Train, *, batch_pairs: int, seed: int) -> Iterator[list[Pair]]:
    """Global batches of all epochs, the same on every rank.

    Epoch 0 takes the pairs as their blocks come in (unless `shuffle_first_epoch`), later epochs in seeded random order.
    Every pair comes once per epoch; the last batch of an epoch may be smaller.
    """
    pairs: list[Pair] = []
    taken = 0
    for block in blocks:
        pairs += block
        while not command.shuffle_first_epoch and len(pairs) - taken >= batch_pairs:
            yield pairs[taken : taken + batch_pairs]
            taken += batch_pairs
    if len(pairs) != sum(command.block_sizes):
        raise RuntimeError(f"iteration {command.iteration} has {len(pairs)} pairs, expected {sum(command.block_sizes)}")
    if not command.shuffle_first_epoch and taken < len(pairs):
        yield pairs[taken:]
    for epoch in range(0 if command.shuffle_first_epoch else 1, command.num_epochs):
        order = np.random.default_rng([seed, command.iteration, epoch]).permutation(len(pairs))
        for start in range(0, len(order), batch_pairs):
            yield [pairs[i] for i in order[start : start + batch_pairs]]


def learning_rate(step: int, total_steps: int, *, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up, then linear decay to 0, as in the paper's recipe. Never 0: the first step already moves."""
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total_steps - step) / (total_steps - warmup)


def _check_first_loss(loss: float, command: Train) -> None:
    if command.expected_first_loss is None:
        return
    expected, allowed = command.expected_first_loss
    if not abs(loss - expected) <= allowed:
        raise FirstLossError(
            f"first loss of iteration {command.iteration} is {loss:.6f}, expected {expected:.6f} ± {allowed:.6f}, because main player and "
            "opponent are the same model there; sampler and learner disagree about weights, template or log-probs"
        )


def _peak_memory_gib() -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on the CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
