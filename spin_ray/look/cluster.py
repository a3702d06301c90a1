"""The nodes of the cluster that RAY_ADDRESS names, each asked by an actor that is pinned to it, and compared with the driver."""

from __future__ import annotations

import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spin_ray.errors import in_one_line
from spin_ray.look.checks import ERROR, OK, WARNING, Found, Subject, in_folder
from spin_ray.look.machine import GIB, LITTLE_DISK_GIB, LITTLE_SHM_GIB
from spin_ray.look.packages import wanted_versions

PATIENCE_S = 60.0
"""For a node's actor to start."""
NUM_ASKED = 5
"""The quickest of so many answers tells a clock best."""
LARGEST_CLOCK_DIFFERENCE_S = 2.0
_MUST_AGREE = ("python", "ray")
"""Ray joins no others."""


class Surroundings:
    """Of the node that this object is on. A plain class; `nodes` makes it an actor."""

    def facts(self) -> dict[str, Any]:
        shm = Path("/dev/shm")
        return {
            "host": socket.gethostname(), "versions": own_versions(), "disk_gib": shutil.disk_usage("/tmp").free / GIB,
            "shm_gib": shutil.disk_usage(shm).free / GIB if shm.is_dir() else 0.0,
        }

    def clock(self) -> float:
        return time.time()


def own_versions() -> dict[str, str]:
    """Python's, and those of the packages that this program's metadata names."""
    found = {"python": platform.python_version()}
    for name in wanted_versions():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def nodes(subject: Subject) -> Iterator[Found]:
    """A finding per node, and one for each thing that is wrong with it; nothing where no cluster is joined."""
    if not subject.joins:
        yield Found(OK, "RAY_ADDRESS is not set: a run starts a Ray of its own on this machine")
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    from spin_ray.system import ray_cluster

    with ray_cluster(in_folder(subject.config, subject.folder), samplers=False, learner=False):
        alive = [node for node in ray.nodes() if node["Alive"]]
        actor = ray.remote(num_cpus=0)(Surroundings)
        asked = [(node, actor.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote()) for node in alive]
        facts = [(node, handle, handle.facts.remote()) for node, handle in asked]
        ends, mine = time.monotonic() + PATIENCE_S, own_versions()
        for node, handle, answer in facts:
            address = node["NodeManagerAddress"]
            try:
                told = ray.get(answer, timeout=max(1.0, ends - time.monotonic()))
                yield from judged(address, told, node["Resources"], _clock_difference(handle), mine)
            except Exception as error:  # of this node; the others have answers of their own
                what = f"{address}: a task there does not answer: {in_one_line(error)}"
                yield Found(ERROR, what, "see that node's Ray logs; is spin_ray installed there?")


def _clock_difference(handle: Any) -> tuple[float, float]:
    """Seconds that a node's clock is ahead of this one's, and how wrong that may be."""
    import ray

    measured = []
    for _ in range(NUM_ASKED):
        before = time.time()
        there = ray.get(handle.clock.remote(), timeout=PATIENCE_S)
        after = time.time()
        measured.append((after - before, there - (before + after) / 2))
    trip, ahead = min(measured)
    return ahead, trip / 2


def judged(
    address: str, told: Mapping[str, Any], resources: Mapping[str, float], clock: tuple[float, float], mine: Mapping[str, str]
) -> Iterator[Found]:
    """What a node's facts mean beside the driver's versions."""
    ahead, unsure = clock
    has = ", ".join(f"{resources.get(resource, 0):g} {resource}" for resource in ("CPU", "GPU"))
    free = f"{told['disk_gib']:,.0f} GiB free at /tmp, {told['shm_gib']:.1f} at /dev/shm"
    yield Found(OK, f"{address} ({told['host']}): {has}, {free}, clock {ahead:+.3f} s (± {unsure:.3f})")
    others = {name: (told["versions"].get(name), own) for name, own in mine.items() if told["versions"].get(name) != own}
    for name, (there, own) in others.items():
        state = ERROR if name in _MUST_AGREE or there is None else WARNING
        yield Found(state, f"{address}: {name} {there or 'is not installed'}, here {own}", "install the same environment on every node")
    if abs(ahead) - unsure > LARGEST_CLOCK_DIFFERENCE_S:
        yield Found(WARNING, f"{address}: its clock is {ahead:+.1f} s from this one's", "let all nodes set their clocks by NTP")
    if told["disk_gib"] < LITTLE_DISK_GIB:
        yield Found(WARNING, f"{address}: only {told['disk_gib']:.1f} GiB free at /tmp", "make room: Ray spills there")
    if told["shm_gib"] < LITTLE_SHM_GIB:
        remedy = "in containers: --shm-size, or a memory-backed volume"
        yield Found(WARNING, f"{address}: only {told['shm_gib']:.1f} GiB free at /dev/shm", remedy)


