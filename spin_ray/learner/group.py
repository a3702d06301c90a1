"""The driver's side of the learner: starts the one Ray Train `fit()` and turns commands into results."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from spin_ray.background import in_background
from spin_ray.config import Config
from spin_ray.errors import in_one_line
from spin_ray.interrupt import Interrupted, Interrupts
from spin_ray.learner.coordinator import Base, Coordinator, Failure
from spin_ray.learner.elastic import ByWhatIsFree
from spin_ray.learner.loop import WorkerArgs, make_main_player, run_worker
from spin_ray.learner.messages import Saving, Stop
from spin_ray.placement import Hardware, beside_driver
from spin_ray.records import Pair, Saved
from spin_ray.storage import DISK, Disk
from spin_ray.tokenizer import read_template


class Learner:
    """The main player as a group of Ray Train workers, alive from `__init__` to `stop`.

    `run` sends a command and returns its result; if a worker or the feed of blocks fails, it raises the first error.
    """

    def __init__(
        self, config: Config, hardware: Hardware, *, saved: Saved, logs: Path, checkpoint: Path | None = None,
        rollbacks: int = 0, storage: Disk = DISK, proof_pairs: tuple[Pair, ...] = (),
        make_player: Callable[[WorkerArgs, Base], Any] = make_main_player,
    ):
        """`rollbacks`: those of the run's earlier sessions. `proof_pairs`: see preflight.py."""
        base = Base(saved, str(checkpoint) if checkpoint else None)
        self.coordinator = ray.remote(**beside_driver(), max_concurrency=1_000)(Coordinator).remote(
            base, max_restarts=config.learner.max_restarts, rollbacks=rollbacks, at_rest=hardware.takes_turns
        )
        self._args = WorkerArgs(
            coordinator=self.coordinator, config=config.learner, hardware=hardware, trust_remote_code=config.model.trust_remote_code,
            chat_template=read_template(config.model.chat_template), quantized=bool(config.model.quantization),
            publish_adapter=bool(saved.adapter) and config.lora.sync == "adapter",
            seed=config.run.seed, log_dir=str(logs), storage=storage, make_player=make_player,
            proof_pairs=proof_pairs, rollback_lr_factor=config.guard.rollback_lr_factor, weights=config.weights,
        )
        self._failed = False
        self._max_failures = config.learner.max_restarts + config.guard.max_rollbacks  # the coordinator tells them apart
        self._ray_train = logs / "ray_train"
        self._thread = threading.Thread(target=self._fit, name="learner", daemon=True)
        self._thread.start()

    def post(self, command: Any) -> int:
        return ray.get(self.coordinator.post.remote([ray.put(command)]))

    def result(self, key: Hashable) -> Any:
        """The result of a command, by its number, or what a command announced under another key."""
        return _unless_failed(ray.get(self.coordinator.result.remote(key)))

    def run(self, command: Any) -> Any:
        return self.result(self.post(command))

    def put_block(self, iteration: int, place: int, block: Any) -> None:
        """Offer a finished block of an iteration, at its place in the order of training; a worker calls its `pairs()`."""
        ray.get(self.coordinator.put_block.remote(iteration, place, [ray.put(block)]))

    def when_failed(self, tell: Callable[[BaseException], None]) -> None:
        """Have `tell` called with the first error, as soon as there is one. No thread waits: one in `ray.get` would meet Ray's end.

        Ray's own thread calls it, so `tell` must not wait for anything of Ray's; `fail` has nothing more to say then.
        """

        def heard(answer: Future) -> None:
            self._failed = True
            tell(answer.exception() or answer.result().error)

        self.coordinator.failure.remote().future().add_done_callback(heard)

    def drain(self) -> list[Any]:
        """StepRecords and Spans that the workers have logged since the last call."""
        return ray.get(self.coordinator.drain.remote())

    def group(self) -> int:
        """How many groups of workers there have been; a new one carries out again what came after the base."""
        return ray.get(self.coordinator.group.remote())

    def wait_for_group_after(self, group: int) -> None:
        """Until Ray Train has started a new group in place of this one, which has lost a worker."""
        _unless_failed(ray.get(self.coordinator.group_after.remote(group)))

    @contextmanager
    def holding(self, group: int) -> Iterator[bool]:
        """While the body runs, no new group of workers begins to write over what `group` wrote; False if one has replaced it already."""
        held = ray.get(self.coordinator.hold.remote(group))
        try:
            yield held
        finally:
            if held:
                ray.get(self.coordinator.let_go.remote())

    def move_base(self, base: Base, group: int) -> bool:
        """Let later groups start from `base`; False if a new one has joined since `group` and is at work from the old base."""
        return ray.get(self.coordinator.move_base.remote(base, group))

    def roll_back(self, group: int) -> bool:
        """Let this group's training start over from theta_t; False if it has been replaced already."""
        return ray.get(self.coordinator.roll_back.remote(group))

    def fail(self, error: BaseException) -> None:
        """Make every waiting worker, and the driver, raise this error (its text, if it cannot be sent)."""
        if self._failed or not ray.is_initialized():
            return  # everybody knows, or nobody waits
        try:
            ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
        except Exception:  # whatever it is that keeps an error from being pickled, its text must arrive
            error = RuntimeError(f"{type(error).__name__}: {error}")
        ray.get(self.coordinator.fail.remote(Failure(error)))

    def let_in(self) -> None:
        """The workers may use their devices, until they have answered a `Rest`."""
        ray.get(self.coordinator.let_in.remote())

    def stop(self) -> None:
        """Let the workers finish and wait for the end of `fit()`."""
        self.post(Stop())
        self.let_in()
        self._thread.join()

    def _fit(self) -> None:
        """One `fit()` for all iterations; a new one only if Ray Train's controller dies, and with it its workers."""
        controllers_left = self._args.config.max_restarts
        while True:
            try:
                if controllers_left < self._args.config.max_restarts:
                    _free_resources()
                self._new_trainer().fit()
                return
            except ray.exceptions.RayActorError as error:
                if not controllers_left:
                    return self._end(error)
                controllers_left -= 1
            except BaseException as error:
                return self._end(error)

    def _end(self, error: BaseException) -> None:
        """Hand an error to whoever waits for a result, which re-raises it."""
        self.fail(error)

    def _new_trainer(self) -> ray.train.torch.TorchTrainer:
        config, hardware = self._args.config, self._args.hardware
        scaling = ray.train.ScalingConfig(
            num_workers=(config.fewest, config.most) if config.is_elastic else config.most,
            label_selector=dict(config.label_selector) or None, use_gpu=hardware.learner_gpus > 0,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": hardware.learner_gpus} if hardware.learner_gpus else {})},
        )
        return _Trainer(
            run_worker,
            train_loop_config={"args": self._args},
            torch_config=ray.train.torch.TorchConfig(backend=hardware.torch_backend),
            scaling_config=scaling,
            policy=ByWhatIsFree(scaling, self.coordinator, config.label_selector, hardware.beside_players) if config.is_elastic else None,
            run_config=ray.train.RunConfig(
                **self._args.storage.for_ray_train(self._ray_train.parent), name=self._ray_train.name,
                failure_config=ray.train.FailureConfig(max_failures=-1 if config.is_elastic else self._max_failures),
                callbacks=[_TellCoordinator(self.coordinator, self._args.log_dir)],
            ),
        )


class _Trainer(ray.train.torch.TorchTrainer):
    """Ray Train's, without two processes. The one that frees a dead controller's resources asks the dashboard, and where none
    runs, as on one machine, it frees nothing and the end of `fit()` waits 12 s for it. The other one's datasets are not ours.

    A number of workers that has bounds is decided by `policy`.
    """

    def __init__(self, *parts: Any, policy: ByWhatIsFree | None = None, **more: Any):
        super().__init__(*parts, **more)
        self._policy = policy

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**(parts | ({"scaling_policy": self._policy} if self._policy else {})))

    def _create_default_callbacks(self) -> list[Any]:
        unwanted = PlacementGroupCleanerCallback, DatasetsCallback
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unwanted)]


def _free_resources() -> None:
    """Take the workers' CPUs and GPUs back from a controller that died. Ray would keep them until the job ends."""
    job = ray.get_runtime_context().get_job_id()
    for name, facts in placement_group_table().items():
        if name.endswith(job) and facts["state"] != "REMOVED":  # nothing else in this job has placement groups
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _unless_failed(answer: Any) -> Any:
    if isinstance(answer, Failure):
        raise answer.error
    return answer


class _TellCoordinator(ray.train.UserCallback):
    """Lives in Ray Train's controller, the only one who hears why a group of workers ended."""

    def __init__(self, coordinator: Any, log_dir: str):
        self._coordinator, self._log_dir = coordinator, log_dir

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank = min(worker_exceptions, key=lambda rank: (not _died(worker_exceptions[rank]), rank))
        error = worker_exceptions[rank]
        what = in_one_line(error) if _died(error) else f"{type(error).__name__}: {in_one_line(error)}"
        cause = f"rank {rank}: {what}; see {self._log_dir}/learner-{rank}.log"
        ray.get(self._coordinator.group_ended.remote(cause))


def _died(error: Exception) -> bool:
    """Whether the worker's process is gone; what the others then raise in their collectives only follows from it."""
    return isinstance(getattr(error, "health_check_failure", None), ray.exceptions.RayActorError)


POLL_S = 0.2
"""How often the driver asks what the workers have to say."""
INTERRUPT_PATIENCE_S = 300.0
"""How long an interrupted training may be silent: it finishes a step and saves its progress, unless it waits for the opponent."""


def follow(
    learner: Learner, key: Hashable, note: Callable[[Any], None], interrupts: Interrupts, *, patience_s: float = INTERRUPT_PATIENCE_S
) -> Any:
    """Wait for a result, passing what the workers have to say meanwhile on as it comes: while they train, and where a new group
    of them trains again.

    Raises Interrupted, after the workers have saved their progress, if the user asked for it meanwhile.
    """
    waiting, patience_ends = in_background(learner.result, key), math.inf
    told = False
    with interrupts.graceful():
        while True:
            finished = waiting.done()
            records = learner.drain()
            for record in records:
                note(record)
            if finished:
                return waiting.result()
            if interrupts.requested and not told:
                ray.get(learner.coordinator.interrupt.remote())
                told, patience_ends = True, time.monotonic() + patience_s
            if told and records:  # however long a save takes, it is what was asked for
                patience_ends = math.inf if isinstance(records[-1], Saving) else time.monotonic() + patience_s
            if time.monotonic() > patience_ends:
                raise Interrupted("interrupted while the main player waited; the same command goes on")
            wait([waiting], timeout=POLL_S)
