"""Starting and ending the distributed parts: Ray itself, the sampler replicas, the learner."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from spin_ray.address import check_ray_address
from spin_ray.config import Config
from spin_ray.errors import BadInput, Enough, RunStopped, in_one_line
from spin_ray.exits import flush_output, lead_nowhere
from spin_ray.placement import Hardware, choose_hardware, learner_goes_first, nodes_of_cluster
from spin_ray.places import remove_short_folder, short_folder, spill_folder
from spin_ray.room import PATIENCE_S, nodes_may_come, wait_for_room

MIN_LOCAL_CPUS = 2
MAX_STARTS = 3
"""How often Ray may be started before it is told that it did not come up."""

RAYS_NICENESS = 15
"""What Ray gives the processes of actors and tasks unless told otherwise."""


@contextmanager
def ray_cluster(
    config: Config, *, samplers: bool = True, learner: bool = True, say: Callable[[str], None] = lambda _: None
) -> Iterator[Hardware]:
    """Join the cluster in RAY_ADDRESS (a submitted job has it), or start Ray on this machine; after an error, `leave` ends it.

    `samplers` and `learner` say which players the command starts; `say` hears what is waited for.
    Raises BadInput if the cluster is too small for the run, and nobody makes it larger within `cluster.wait_s`.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how long a worker's death, or the end of all, goes unnoticed
    joins, wait_s = bool(os.environ.get("RAY_ADDRESS")), config.cluster.wait_s
    with _joined() if joins else _started(config, samplers=samplers, learner=learner) as learner_first:
        may_grow = joins and (nodes_may_come() if wait_s is None else wait_s > 0)
        hardware = choose_hardware(
            config, nodes_of_cluster(), samplers=samplers, learner=learner, learner_first=learner_first, may_grow=may_grow
        )
        if joins:
            wait_for_room(hardware.actors, PATIENCE_S if wait_s is None else wait_s, nodes_of_cluster, say)
        yield hardware
        ray.shutdown()


@contextmanager
def _joined() -> Iterator[bool]:
    """Join the cluster in RAY_ADDRESS; raises BadInput, within seconds, if there is none or it does not want this user."""
    given = os.environ["RAY_ADDRESS"]
    try:
        found = ray._private.services.canonicalize_bootstrap_address("auto") if given == "auto" else given
        check_ray_address(found, "RAY_ADDRESS")
        with _all_or_nothing():
            ray.init(log_to_driver=False, configure_logging=False)
    except ray.exceptions.AuthenticationError as error:
        raise BadInput(
            f"RAY_ADDRESS={given}: the cluster wants a token: set RAY_AUTH_MODE=token and bring the head's ~/.ray/auth_token here"
        ) from error
    except (ConnectionError, ray.exceptions.RpcError) as error:
        raise BadInput(f"RAY_ADDRESS={given}: no Ray cluster can be joined there: {in_one_line(error)}") from error
    yield False


@contextmanager
def _started(config: Config, *, samplers: bool, learner: bool) -> Iterator[bool]:
    """A Ray of this process's own; yields whether the learner's workers go first. What Ray logged is kept if the body fails."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody drains this machine
    cpus, gpus = max(os.cpu_count() or 1, MIN_LOCAL_CPUS), torch.cuda.device_count()
    learner_first = learner_goes_first(config, num_gpus=gpus, samplers=samplers, learner=learner)
    with short_folder() as folder:
        try:
            _init_patiently(
                "local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False,
                log_to_driver=False, configure_logging=False, _temp_dir=str(folder), object_spilling_directory=spill_folder(folder),
                # Play tasks come in bursts, one per iteration: keep their processes instead of starting new ones each time.
                # At the niceness that Ray gives them, two busy processes of somebody else would leave them a thirtieth of a core.
                _system_config={"idle_worker_killing_time_threshold_ms": 3_600_000, "worker_niceness": 0},
            )
            yield learner_first
        except Exception as error:
            if not isinstance(error, (BadInput, Enough)):
                _keep_logs(folder, config.run_path / "logs" / "ray")
            raise


def _init_patiently(*args: Any, **options: Any) -> None:
    """`ray.init`, again where Ray did not come up in time: its raylet gives its own helpers 15 s, too few on a very busy machine."""
    for attempt in range(1, MAX_STARTS + 1):
        try:
            with _all_or_nothing():
                ray.init(*args, **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            if attempt == MAX_STARTS:
                raise RunStopped(
                    f"Ray did not come up in {MAX_STARTS} attempts: this machine is too busy, or its processes cannot reach each other; "
                    "its logs are kept under the run's logs/ray; the same command goes on"
                ) from error
            logging.getLogger(__name__).warning("start %d of %d: %s", attempt, MAX_STARTS, in_one_line(error))


def _keep_logs(folder: Path, kept: Path) -> None:
    with suppress(OSError, shutil.Error):  # the error that is under way matters more
        shutil.copytree(folder / "session_latest" / "logs", kept, dirs_exist_ok=True)


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """End the processes that the body has started if it fails."""
    before = set(psutil.Process().children())
    try:
        yield
    except BaseException:
        for child in set(psutil.Process().children()) - before:
            for process in [*child.children(recursive=True), child]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        raise


class Neighbours:
    """What processes other than this one and its own have computed on this machine since this was made."""

    def __init__(self) -> None:
        self._begun = self._seconds()

    def crowd(self) -> bool:
        """Whether they take half a core or more, and nothing is left over: whoever steps back here would not come to compute at all."""
        elapsed, busy, own = (now - then for now, then in zip(self._seconds(), self._begun, strict=True))
        cores = psutil.cpu_count()
        return busy - own > 0.5 * elapsed and busy > (cores - 0.5) * elapsed

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Elapsed, and computed by all processes and by ours; what a process has waited for counts as its own."""
        machine, own = psutil.cpu_times(), 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended
                own += sum(process.cpu_times()[:4])
        return time.monotonic(), machine.user + machine.nice + machine.system, own


def let_learner_go_first() -> None:
    """Give all actors and tasks of a Ray that this process has started, but the learner's workers, the niceness that Ray's have by default.

    An ordinary user may lower a priority, not raise it; so all of them have been started with the learner's.
    """
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            title = " ".join(process.cmdline()[:1])
            if title.startswith("ray::") and not title.startswith(("ray::RayTrainWorker", "ray::IDLE")):  # idle ones may become a worker
                for thread in process.threads():  # a process's niceness is its first thread's alone
                    with suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, thread.id, RAYS_NICENESS)


def leave(code: int) -> None:
    """End a process whose run has failed, if Ray is up: at once, with the processes of a Ray that it started itself.

    Not by `ray.shutdown`: threads of Ray Data may still be at work, and one that meets a Ray that is shut down ends the process
    with a code of its own, before its message is out.
    """
    if ray.is_initialized():
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # it cannot end sooner
        flush_output()
        lead_nowhere(2)  # what Ray's own threads say of the processes that go is no news
        for process in psutil.Process().children(recursive=True):  # a cluster that was joined is nobody's child
            with suppress(psutil.NoSuchProcess):
                process.kill()
        remove_short_folder()
        os._exit(code)
    remove_short_folder()


def first_error(error: BaseException) -> BaseException:
    """Under the wrappings of Ray, Ray Data and Ray Train, the error that started it all."""
    seen = {id(error)}
    while not isinstance(error, (BadInput, Enough, RunStopped)) or isinstance(error, ray.exceptions.RayError):
        failures = getattr(error, "worker_failures", None) or {}
        inner = next(iter(failures.values()), None) or getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException) or id(inner) in seen:
            return _actor_died(error) if isinstance(error, ray.exceptions.ActorDiedError) and not error.actor_init_failed else error
        seen.add(id(inner))
        error = inner
    return error


def _actor_died(error: ray.exceptions.ActorDiedError) -> RunStopped:
    what = " ".join(str(error).split("actor_id:")[0].split())
    return RunStopped(f"a process that nothing replaces is dead: {what}; everything finished is kept, the same command goes on")
