"""What a Ray Train worker does: take the next command from the coordinator, let the main player carry it out, report.

Commands are plain messages. Every rank gets every command, and every pair: a rank picks its share of each global batch
by itself (packing.py), so the batches, and the model after them, do not depend on the number of workers.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray

from spin_ray.chatter import redirect_output
from spin_ray.config import LearnerConfig, WeightsConfig
from spin_ray.errors import BadInput, Diverged, RunStopped
from spin_ray.imports import without_gc
from spin_ray.interrupt import Interrupted
from spin_ray.learner.batches import BlockFeed, batches, learning_rate
from spin_ray.learner.coordinator import Base, DriverFailed, Failure, Joined, unwrapped
from spin_ray.learner.kept import Example, Kept, once_all_are_there
from spin_ray.learner.messages import (
    Count,
    Divergence,
    Grouped,
    Proved,
    Publish,
    Rest,
    Restore,
    Save,
    Saving,
    Score,
    StepRecord,
    Stop,
    Train,
    TrainReport,
    Wish,
)
from spin_ray.placement import Hardware, own_devices, own_gpu
from spin_ray.records import Devices, Pair, PublishedWeights, Saved, Span, Version, opponent_reference
from spin_ray.storage import Disk, readable_disk_errors
from spin_ray.transport import Transport, transport_of


@dataclass(frozen=True)
class WorkerArgs:
    """What a worker needs to start."""

    coordinator: Any
    config: LearnerConfig
    hardware: Hardware
    trust_remote_code: bool
    seed: int
    log_dir: str
    storage: Disk
    """Where what the workers write lies for good."""
    make_player: Callable[[WorkerArgs, Base], Any]
    """Makes the worker's main player; not the real one only in measurements of what is around it."""
    chat_template: str = ""
    """Text of one in place of the tokenizer's own: exported with the model."""
    quantized: bool = False
    """Hold the base in 4 bits."""
    publish_adapter: bool = False
    """Publish the adapter alone; else all weights, with the adapter, if there is one, merged into them."""
    proof_pairs: tuple[Pair, ...] = ()
    """Pairs on which the model is compared with plain transformers before the first step."""
    rollback_lr_factor: float = 1.0
    """What each rollback multiplies the learning rate by."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How new weights get to the samplers."""


def make_main_player(args: WorkerArgs, base: Base) -> Any:
    """The real one: model and DeepSpeed engine on this worker's device."""
    import ray.train.torch
    import torch

    os.environ.update(args.hardware.learner_env)
    with without_gc():
        from spin_ray.learner.engine import MainPlayer  # DeepSpeed reads the environment when it is imported

    torch.manual_seed(args.seed)
    if args.hardware.device == "cuda":
        torch.cuda.set_device(ray.train.torch.get_device())
        if args.hardware.takes_turns:
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # else pieces of what is given back stay
    with _naming_this_host():  # one that lacks what others have must say so: they wait for it in a collective
        player = MainPlayer(
            base.saved.fetched(args.storage), args.config, args.hardware, trust_remote_code=args.trust_remote_code,
            chat_template=args.chat_template, proof_pairs=args.proof_pairs, quantized=args.quantized,
        )
    if player.proof and player.rank == 0:
        ray.get(args.coordinator.log.remote(Proved(f"model: {player.proof}", player.proof.seconds)))
    if base.checkpoint_path:
        checkpoint = Path(base.checkpoint_path)
        player.load_checkpoint(args.storage.fetch(checkpoint), name=args.storage.name(checkpoint))
    return player


@contextmanager
def _naming_this_host() -> Iterator[None]:
    """What is wrong with an input is wrong on this host."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"the main player on {socket.gethostname()}: {error}") from error


def plain_real_logps(saved: Saved, dtype: str, pairs: Sequence[Pair], log_path: str) -> list[np.ndarray]:
    """Log-probs of the pairs' real answers by plain transformers on a CPU, one array [num_real_tokens] each, in nats.

    A task of its own, where there is no learner to compare the sampler with.
    """
    redirect_output(log_path)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    with without_gc():
        from spin_ray.learner.adapter import Adapter
        from spin_ray.learner.loading import load_model
        from spin_ray.learner.proof import as_transformers_means_it, plain_logps

    lm = load_model(saved.model, dtype=getattr(torch, dtype))
    if saved.adapter:
        Adapter(lm, Path(saved.adapter))
    with torch.no_grad(), as_transformers_means_it(lm):
        return [plain_logps(lm, pair.prompt_ids, pair.real_ids).float().numpy() for pair in pairs]


def run_worker(loop_config: dict[str, WorkerArgs]) -> None:
    """The `train_loop_per_worker` of the one TorchTrainer.

    What it raises, Ray Train answers with a new group of workers. So an error that would only come again goes to the driver
    instead, and a failure of the driver's side ends the loop.
    """
    import ray.train

    args = loop_config["args"]
    redirect_output(f"{args.log_dir}/learner-{ray.train.get_context().get_world_rank()}.log")
    try:
        unwrapped(args.coordinator.turn.remote())  # every rank for itself: collectives do not wait for hours
        joined = _join(args.coordinator)
        if joined.group > 1:
            args = replace(args, proof_pairs=())  # the first group has proved it
        Worker(args.make_player(args, joined.base), args, joined, drivers_clock(args.coordinator)).serve()
    except (BadInput, RunStopped) as error:
        ray.get(args.coordinator.fail.remote(Failure(error)))
    except DriverFailed:
        return


def drivers_clock(coordinator: Any) -> Callable[[], float]:
    """Seconds since the epoch by the clock of the driver's host, asked for once: this host's own may be off."""
    asked = time.monotonic()
    ahead = ray.get(coordinator.now.remote()) - (asked + time.monotonic()) / 2
    return lambda: ahead + time.monotonic()


def _of_all_ranks(own: Devices) -> Devices:
    import torch.distributed as dist

    found: list[Devices] = [()] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return tuple(itertools.chain.from_iterable(found))


class Grows(Exception):
    """Ends a group of workers that is to be larger: Ray Train starts it, and it takes up the progress."""


class RolledBack(Exception):
    """Ends a group of workers whose weights are spoilt: Ray Train starts a new one, which joins at theta_t."""


def _join(coordinator: Any) -> Joined:
    """Where this group of workers begins: rank 0 asks, once, and tells the others."""
    import torch.distributed as dist

    answer = [ray.get(coordinator.join.remote()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Failure):
        raise DriverFailed
    return answer[0]


class Worker:
    """Carries out commands with a MainPlayer."""

    def __init__(self, player: Any, args: WorkerArgs, joined: Joined, now: Callable[[], float] = time.time):
        """`now`: the driver's clock, which spans are by."""
        self._player, self._args, self._joined, self._now = player, args, joined, now
        self._coordinator = args.coordinator
        self._iteration = 0
        self._at_rest = False
        self._at_base = True
        """Whether the next training is the base's, which earlier groups may have begun."""
        self._logged: list[Any] = []
        self._wish = Wish()
        self._steps_saved = 0
        """Optimizer steps of the progress that is saved, 0 if none is."""

    def serve(self) -> None:
        """Carry out the commands from the base's first one on, until a `Stop`."""
        import torch.distributed as dist

        if self._args.config.is_elastic:
            self._log(Grouped(dist.get_world_size()))
        number = self._joined.base.first_command
        while not isinstance(command := self._command(number), Stop):
            if isinstance(command, Rest):
                self.rest(number)
            elif command:
                result = self.carry_out(command)
                self.wait_for_all_ranks()  # `ray.train.report` is a barrier too, but takes seconds: its controller polls
                self.answer(number, result)
            number += 1

    def _command(self, number: int) -> Any:
        posted = unwrapped(self._coordinator.command.remote(number))
        return posted and ray.get(posted[0])

    def rest(self, number: int) -> None:
        """Carry out a `Rest`; returns when it is the main player's turn. Its memory comes back with the next command."""
        devices = _of_all_ranks(own_devices())
        with self._span("rest"):
            self._player.rest()
        self.wait_for_all_ranks()
        if self._player.rank == 0:
            ray.get(self._logged)
            ray.get(self._coordinator.give_away.remote(number, devices, self._joined.group))
        self.wait_for_all_ranks()  # before that, the turn is still ours
        unwrapped(self._coordinator.turn.remote())
        self._at_rest = True

    def carry_out(self, command: Any) -> Any:
        if self._at_rest:
            self._at_rest = False
            with self._span("wake"):
                self._player.wake()
        match command:
            case Train():
                return self._train(command)
            case Score():
                with self._span("score"):
                    return self._player.token_logps(command.pairs)
            case Publish():
                with self._span("publish"):
                    return self._publish(command.version)
            case Save():
                with self._span("save"):
                    return self._save(command)
            case Restore():
                path = Path(command.checkpoint_path)
                return self._player.load_checkpoint(self._args.storage.fetch(path), name=self._args.storage.name(path))
        raise TypeError(f"unknown command {command!r}")

    def wait_for_all_ranks(self) -> None:
        self._player.wait_for_all_ranks()

    def _train(self, command: Train) -> TrainReport:
        self._iteration = command.iteration
        self._prepare_transport()
        config, started = self._args.config, time.perf_counter()
        feed = BlockFeed(
            self._coordinator, command.iteration, len(command.block_sizes), self._log_span, self._now, wait_for_all=command.wait_for_all
        )
        blocks = self._scored(feed, command)
        count = self._take_up(command)
        total_steps, peak = command.num_steps, command.lr * self._args.rollback_lr_factor**self._joined.rollbacks
        metrics: dict[str, Any] = {}
        snapshot = command.snapshot
        order = {"batch_pairs": config.batch_pairs, "seed": self._args.seed, "first_step": count.steps}  # those before are trained on
        for step, batch in enumerate(batches(blocks, command, Kept(), **order), count.steps):
            if step == total_steps:
                break
            if snapshot and step >= snapshot[0]:  # later only where progress was taken up behind it
                self.answer(snapshot[1], self._publish(snapshot[1]))
                snapshot = None
                self._prepare_transport()
            lr = learning_rate(step, total_steps, peak=peak, warmup_fraction=config.warmup_fraction)
            pairs, references = [pair for pair, _ in batch], np.array([reference for _, reference in batch])
            begun = time.perf_counter()
            metrics = self._player.step(pairs, references, objective=command.objective, lr=lr)
            seconds = time.perf_counter() - begun
            try:
                check_numbers(metrics, command.iteration, step, lr, self._args.log_dir)
            except Diverged as error:
                if command.is_a_try:
                    break
                self._wait_for_rollback(Divergence(self._joined.group, command.iteration, step, error))
            count = count.after(metrics, len(batch))
            self._log(StepRecord(command.iteration, step, total_steps, {
                **metrics, **staleness(pairs), **answer_facts(pairs), "lr": lr, "pairs_per_s": len(batch) / seconds,
                "tokens_per_s": metrics["num_tokens"] / seconds, "waited_s": feed.waited_s,
            }, self._joined.group))
            interrupted, grows = self._player.any_rank(self._wish.end, self._wish.grow_in == command.iteration)
            due = config.checkpoint_every_steps and count.steps % config.checkpoint_every_steps == 0
            if command.progress_path and count.steps < total_steps and (due or interrupted or grows):
                self._save_progress(command, count)
                if grows and not interrupted:
                    self._make_way()
            if interrupted and count.steps < total_steps:
                kept = "the same command goes on" if command.progress_path else "the same command starts again"
                raise Interrupted(f"interrupted after step {step + 1} of {total_steps} of iteration {command.iteration}; {kept}")
        feed.close()
        return TrainReport(
            count.steps, count.pairs, count.tokens, time.perf_counter() - started, feed.waited_s, count.first_loss,
            count.expected_first_loss, metrics.get("peak_memory_gib", 0.0),
        )

    def _take_up(self, command: Train) -> Count:
        """Begin the iteration, or go on from the progress that an earlier group of workers saved.

        Only the base's: an earlier group that got further did so from another theta_t than this one's, which nobody has.
        """
        self._player.begin_iteration()
        self._steps_saved = 0
        at_base, self._at_base = self._at_base, False
        afresh = Count(rollbacks=self._joined.rollbacks)
        if command.progress_path is None:
            return afresh
        storage, state = self._args.storage, _progress(command)[0]
        if not at_base and self._player.rank == 0:
            storage.remove(state.parent)  # lest a later group, whose base this iteration is, believe it
        if not at_base or not storage.fetch(state).exists():
            return afresh
        count = _read_count(state, storage)
        self._steps_saved = count.steps
        if count.rollbacks != afresh.rollbacks:
            return afresh  # it is on the way to where the numbers went bad
        saved = _progress(command, count.steps)[1]
        self._player.load_checkpoint(storage.fetch(saved), name=storage.name(saved))
        return count

    def _wait_for_rollback(self, divergence: Divergence) -> NoReturn:
        """All ranks see the same numbers, and end together when the driver says so; if it does not, it ends the run."""
        self._log(divergence)
        unwrapped(self._coordinator.rolled_back.remote(divergence.group))
        raise RolledBack(str(divergence.error))

    def _make_way(self) -> NoReturn:
        """End, for a larger group of workers that goes on from the progress."""
        if self._player.rank == 0:
            ray.get([*self._logged, self._coordinator.growing.remote(self._joined.group)])
        self.wait_for_all_ranks()
        raise Grows(f"{self._player.world_size} workers make way for more")

    def _save_progress(self, command: Train, count: Count) -> None:
        """Save the player as it is. `count.json` says which folder is believed: a save that is cut short changes nothing."""
        storage, state, folder = self._args.storage, *_progress(command, count.steps)
        self._log(Saving())
        with self._span("save"):
            self._write_folder(folder, self._player.save_checkpoint)
            self.wait_for_all_ranks()
            if self._player.rank == 0:
                storage.commit(folder)
                with storage.written(state) as file:
                    file.write_text(json.dumps(asdict(count)))
                if self._steps_saved not in (0, count.steps):  # equal: from before a rollback, and replaced
                    storage.remove(_progress(command, self._steps_saved)[1])
            self.wait_for_all_ranks()  # one that ends for an interrupt now would end the run before rank 0 has marked it
        self._steps_saved = count.steps

    def _write_folder(self, path: Path, write: Callable[[Path], None]) -> None:
        """All ranks write into the draft of a folder, which is left to be committed."""
        storage = self._args.storage
        leads = storage.leads(self._player.rank, int(os.environ["LOCAL_RANK"]))
        with readable_disk_errors(path):
            if leads:
                storage.prepare(path)
            self.wait_for_all_ranks()
            write(storage.draft(path))
            self.wait_for_all_ranks()
            if leads:
                storage.upload(path)

    def _scored(self, blocks: Iterable[list[Pair]], command: Train) -> Iterator[list[Example]]:
        """The blocks with the references of their pairs: the opponent's, or the learner's own under theta_t; and theta_0's if asked for.

        `frozen` scores a block when it comes, with a copy of theta_t; `learner` scores all of them before the first step.
        """
        player, scorer = self._player, command.scorer
        if scorer == "frozen":
            player.keep_copy("opponent")
        if command.base:
            player.keep_copy("base", command.base.fetched(self._args.storage))

        def references(block: list[Pair]) -> np.ndarray:
            if scorer == "opponent":
                own = np.array([opponent_reference(pair) for pair in block])
            else:
                own = player.score(block, copy="opponent" if scorer == "frozen" else None)
            return np.stack([own, *([player.score(block, copy="base")] if command.base else [])], axis=1)

        scored = (list(zip(block, references(block), strict=True)) for block in blocks)
        return once_all_are_there(scored) if scorer == "learner" else scored

    def answer(self, key: Hashable, result: Any) -> None:
        if self._player.rank == 0:
            ray.get(self._logged)  # what was logged before is there before the answer
            ray.get(self._coordinator.answer.remote(key, result, self._joined.group))

    def _log(self, record: Any) -> None:
        if self._player.rank == 0:
            for wish in ray.get(self._logged):  # has long arrived; sent before it, the next one could overtake the last
                self._wish = wish
            self._logged = [self._coordinator.log.remote(record)]

    def _log_span(self, activity: str, begin: float, end: float) -> None:
        self._log(Span("main player", activity, self._iteration, begin, end))

    @contextmanager
    def _span(self, activity: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._log_span(activity, begin, self._now())

    @cached_property
    def _transport(self) -> Transport:
        return transport_of(self._args.weights)

    def _prepare_transport(self) -> None:
        """Before weights are published, at best long before."""
        if self._player.rank == 0:
            log, env = f"{self._args.log_dir}/sender.log", self._args.hardware.sampler_env
            self._transport.prepare(log_path=log, env=env, gpu=own_gpu(self._args.hardware))

    def _publish(self, version: Version) -> PublishedWeights:
        from spin_ray.exchange.weights import BUCKET_BYTES, to_bucket

        player, buckets, num_bytes, adapter = self._player, [], 0, None
        if self._args.publish_adapter:
            files = player.adapter_weights()
            parts, adapter = [list(files.tensors.items())] if files else [], files and files.config
        else:
            parts = player.weights(BUCKET_BYTES)
        for tensors in parts:
            if tensors:
                bucket = to_bucket(tensors)
                num_bytes += bucket.num_bytes
                buckets.append(ray.put(bucket))
        self._prepare_transport()
        return PublishedWeights(version, tuple(buckets), num_bytes, player.tied_names, adapter, sender=self._transport.sender())

    def _save(self, command: Save) -> None:
        from spin_ray.exchange.weights import BUCKET_BYTES

        if command.model_path:
            self._write_folder(Path(command.model_path), lambda folder: self._player.export(folder, BUCKET_BYTES))
        if command.adapter_path:
            self._write_folder(Path(command.adapter_path), self._player.export_adapter)
        if command.checkpoint_path:
            self._write_folder(Path(command.checkpoint_path), self._player.save_checkpoint)


def _progress(command: Train, steps: int = 0) -> tuple[Path, Path]:
    """The progress of an iteration: the file that says how far it is, and the folder of the player after so many steps."""
    folder = Path(command.progress_path)
    return folder / "count.json", folder / f"step_{steps}"


def _read_count(state: Path, storage: Disk) -> Count:
    try:
        return Count(**json.loads(state.read_text()))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{storage.name(state)}: damaged ({error}); remove its folder to begin the iteration's training again") from error


def check_numbers(metrics: dict[str, float], iteration: int, step: int, lr: float, log_dir: str) -> None:
    """Raise Diverged at the first loss or gradient that is not a number: no later step could mend the weights."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise Diverged(
                f"iteration {iteration}, step {step}: {name} is {metrics[name]} (lr {lr:g}, loss {metrics['loss']:g}); "
                f"the models of finished iterations are kept; see metrics.jsonl and {log_dir}/learner-0.log, and try a smaller spin.lr"
            )


def answer_facts(pairs: Sequence[Pair]) -> dict[str, float]:
    """Lengths of a batch's answers in tokens, and of the generated ones, where there are any, the shares that are y itself or cut off."""
    facts = {"real_tokens": float(np.mean([len(pair.real_ids) for pair in pairs]))}
    if written := [pair for pair in pairs if len(pair.generated_ids)]:
        facts |= {
            "generated_tokens": float(np.mean([len(pair.generated_ids) for pair in written])),
            "same_as_real_share": float(np.mean([np.array_equal(pair.real_ids, pair.generated_ids) for pair in written])),
            "truncated_share": float(np.mean([pair.finish_reason == "length" for pair in written])),
        }
    return facts


def staleness(pairs: Sequence[Pair]) -> dict[str, float]:
    """Share of a batch's pairs that a snapshot wrote for this iteration, and by how many optimizer steps early at most."""
    early = [pair.opponent_steps_early if pair.opponent_version == pair.iteration else 0 for pair in pairs]
    return {"stale_share": float(np.mean(np.array(early) > 0)), "max_staleness_steps": float(max(early))}
