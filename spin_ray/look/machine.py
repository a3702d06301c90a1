"""What this machine has: devices, memory, disks, a compiler, ports, limits."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from spin_ray.address import check_ray_address
from spin_ray.errors import BadInput
from spin_ray.look.checks import ERROR, OK, WARNING, Found, Subject
from spin_ray.places import can_write, stand_in_for_home
from spin_ray.storage import open_storage

GIB = 2**30
LITTLE_MEMORY_GIB, LITTLE_DISK_GIB, NO_DISK_GIB, LITTLE_SHM_GIB = 8.0, 20.0, 2.0, 2.0
FEW_FILES = 4096
RAY_PORTS = {6379: "a head's address", 8265: "its dashboard, where jobs are submitted", 10001: "its clients"}
_QUERY = "name,memory.total,memory.used,driver_version"


def gpus(*_: object) -> Iterator[Found]:
    """By the driver's own tool; what torch sees is compared with it."""
    lines = _nvidia_smi()
    if not lines:
        yield Found(OK, "none: both players compute on the CPU")
        return
    for number, line in enumerate(lines):
        name, total, used, driver = (part.strip() for part in line.split(","))
        busy = f", {used} MiB of them are in use" if float(used) > 0.05 * float(total) else ""
        yield Found(WARNING if busy else OK, f"GPU {number}: {name}, {total} MiB, driver {driver}{busy}", "nvidia-smi says by whom")
    import torch  # not at the top: it loads for seconds

    seen = torch.cuda.device_count()
    if seen != len(lines) and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        yield Found(
            ERROR, f"torch {torch.__version__} sees {seen} of {len(lines)} GPUs",
            "install the packages for GPUs (pip install 'spin-ray[gpu]'), and a driver that is new enough for them",
        )


def _nvidia_smi() -> list[str]:
    """A line per GPU; none where there is no driver. Raises RuntimeError for a driver that does not answer as it should."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    if asked.returncode:
        raise RuntimeError(f"nvidia-smi fails: {(asked.stdout or asked.stderr).strip()}")
    return [line for line in asked.stdout.splitlines() if line.count(",") == 3]


def memory(*_: object) -> Iterator[Found]:
    """Of the machine, or less where a container has a limit."""
    found = psutil.virtual_memory()
    limit = _container_limit()
    total = min(found.total, limit or found.total)
    whose = " (the limit of this container)" if total < found.total else ""
    what = f"{total / GIB:.1f} GiB{whose}, {found.available / GIB:.1f} free, {os.cpu_count()} cores"
    yield Found(WARNING if total < LITTLE_MEMORY_GIB * GIB else OK, what)


def _container_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(path).exists() and (text := Path(path).read_text().strip()).isdigit():
            return int(text)
    return None


def disks(subject: Subject) -> Iterator[Found]:
    """Where the run lies, and where temporary files do."""
    run = subject.config.run_path
    key = "run.scratch" if subject.config.on_object_store else "run.dir"
    for name, folder in ((key, run), ("temporary files", Path(tempfile.gettempdir()))):
        place = nearest(folder)
        free = shutil.disk_usage(place).free / GIB
        state = ERROR if free < NO_DISK_GIB else WARNING if free < LITTLE_DISK_GIB else OK
        yield Found(state, f"{name}: {free:,.1f} GiB free at {place}")
        if not os.access(place, os.W_OK):
            yield Found(ERROR, f"{name}: {place} cannot be written", f"give another {key}, or mend that one")


def store(subject: Subject) -> Iterator[Found]:
    """The object store that a run's files go to; nothing where they go to a disk."""
    config = subject.config
    if config.on_object_store:
        storage = open_storage(config)
        there = storage.exists(config.run_path / "config.json")
        yield Found(OK, f"{storage.name(config.run_path)}: the store answers, and {'a' if there else 'no'} run is there")


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def shared_memory(*_: object) -> Iterator[Found]:
    """Ray's object store lies there, and the ranks of a tensor-parallel engine talk through it."""
    if not Path("/dev/shm").is_dir():
        yield Found(WARNING, "there is no /dev/shm: Ray's object store lies on the disk then")
        return
    size = shutil.disk_usage("/dev/shm")
    yield Found(WARNING if size.free < LITTLE_SHM_GIB * GIB else OK, f"{size.total / GIB:.1f} GiB, {size.free / GIB:.1f} free")


def compiler(*_: object) -> Iterator[Found]:
    """DeepSpeed builds one small extension."""
    names = [name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name]
    found = next((path for name in names if (path := shutil.which(name))), None)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(os.sys.executable).parent))
    yield Found(OK if found else ERROR, found or f"none of {', '.join(names)} is there")
    if not ninja:
        yield Found(ERROR, "ninja is not there, with which torch builds extensions", "pip install ninja")


def ports(subject: Subject) -> Iterator[Found]:
    """Those that `ray start --head` takes unless told otherwise. A run on one machine takes whatever is free."""
    told, state = [], OK
    for port, use in RAY_PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(2)
            free = probe.connect_ex(("127.0.0.1", port)) != 0
        by_ray = not free and _is_ray(port)
        told.append(f"{port} {'free' if free else 'a Ray' if by_ray else f'taken by something else ({use})'}")
        state = state if free or by_ray else WARNING
    yield Found(state, ", ".join(told))


def _is_ray(port: int) -> bool:
    """Whether a Ray head's part listens: gRPC, or a process of Ray's that this user may see."""
    try:
        check_ray_address(f"127.0.0.1:{port}", "")
        return True
    except BadInput:
        return any("ray" in (process.info["name"] or "") for process in _listening(port))


def _listening(port: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["name"]):
        try:
            if any(one.laddr and one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in process.net_connections("tcp")):
                yield process
        except psutil.Error:
            continue


def open_files(*_: object) -> Iterator[Found]:
    """Ray raises the soft limit to the hard one by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < FEW_FILES
    yield Found(WARNING if few else OK, f"ulimit -n: {soft}, at most {'any number' if hard == resource.RLIM_INFINITY else hard}")


def home(*_: object) -> Iterator[Found]:
    """Caches, W&B's key and Ray's token lie there; what stands in for it does so for the checks after this one too. Raises BadInput."""
    stand_in_for_home()
    place = Path(os.path.expanduser("~"))
    writable = can_write(place)
    yield Found(OK if writable else WARNING, f"{place} can{'' if writable else 'not'} be written")
