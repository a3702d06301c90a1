"""One process per run: who works on it, since when, and whether that process is still alive.

Two things say so. `flock` on the run's lock file ends with its owner, however it ends, and is the truth where it reaches. What
it cannot tell another machine, on NFS or an object store, the owner's record does, which it renews every BEAT_S: an owner
whose record stays the same while another process watches it for SILENT_S is dead. So no clocks are compared, and a process
that was believed dead and wakes up finds another owner's record at its next beat, and ends.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import psutil

from spin_ray.background import every
from spin_ray.errors import BadInput
from spin_ray.storage import Disk

BEAT_S = 10.0
SILENT_S = 60.0
_RECORD_BYTES = 1024
_FREE = b" " * _RECORD_BYTES


@dataclass(frozen=True)
class Owner:
    """What the record says. Times are seconds since 1970."""

    token: str
    who: str
    """user@host (pid ...)."""
    machine: str
    """Where its process number means something."""
    pid: int
    born: int
    """Clock ticks from the machine's start to the process's: another one may have its number later."""
    since: float
    """When it took the run."""
    seen: float
    """Its last sign of life."""

    @classmethod
    def this_process(cls) -> Owner:
        pid, now = os.getpid(), time.time()
        who = f"{psutil.Process().username()}@{socket.gethostname()} (pid {pid})"
        return cls(uuid.uuid4().hex, who, _this_machine(), pid, _born(pid), now, now)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC)
        return f"{self.who}, since {since:%Y-%m-%d %H:%M:%S} UTC ({_age(self.since)}), last sign of life {_age(self.seen)} ago"

    def is_dead(self) -> bool:
        """Whether this machine knows that the process is gone; of another machine's it knows nothing."""
        return self.machine == _this_machine() and self.born != _born(self.pid)


@contextmanager
def held(storage: Disk, path: Path) -> Iterator[None]:
    """Be the only process that works on a run for as long as the body runs; `path` is its lock file.

    Raises BadInput, naming the owner, if another one is at work. A dead owner is replaced, where nothing else tells that it is
    dead after SILENT_S of watching.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        flocked = storage.flock(path)
    except BlockingIOError as error:
        raise _refusal(storage, path, _owner(storage, path)) from error
    with flocked, os.fdopen(os.dup(2), "w") as to_user:
        _wait_for_silence(storage, path, to_user)
        me = Owner.this_process()
        _write(storage, path, me)
        try:
            with every(BEAT_S, lambda: _beat(storage, path, me, to_user)):
                yield
        finally:
            storage.overwrite(path, _FREE)


def seen_at_work(storage: Disk, path: Path, *, patience_s: float = 2 * BEAT_S, earlier: Owner | None = None) -> tuple[Owner | None, bool]:
    """Who has a run, for one who only looks, and whether that process is alive: nothing is locked or written.

    Of a process of another machine a renewed record tells, so it is watched for `patience_s`, unless it differs from `earlier` already.
    Without an owner, or with a dead one: (the last owner or None, False). Raises BadInput for a damaged record.
    """
    owner = _owner(storage, path)
    if owner is None or owner.machine == _this_machine():
        return owner, owner is not None and not owner.is_dead()
    ends, last = time.monotonic() + patience_s, earlier or owner
    while owner is not None and owner == last and time.monotonic() < ends:
        time.sleep(min(1.0, patience_s / 10))
        owner = _owner(storage, path)
    return owner or last, owner is not None and owner != last


def _wait_for_silence(storage: Disk, path: Path, to_user: TextIO) -> None:
    """Return when the run has no living owner; raise BadInput as soon as one shows a sign of life."""
    seen, ends = _owner(storage, path), time.monotonic() + SILENT_S
    if seen is None or seen.is_dead():
        return
    if seen.machine == _this_machine():
        raise _refusal(storage, path, seen)
    print(f"spin-ray: {storage.name(path.parent)}: waiting {SILENT_S:g} s for a sign of life of {seen}", file=to_user, flush=True)
    while time.monotonic() < ends:
        time.sleep(SILENT_S / 60)
        owner = _owner(storage, path)
        if owner is None:
            return
        if owner != seen:
            raise _refusal(storage, path, owner)


def _beat(storage: Disk, path: Path, me: Owner, to_user: TextIO) -> None:
    """Renew the record; end this process at once if it has become another's."""
    owner = _owner(storage, path)
    if owner and owner.token != me.token:
        print(f"spin-ray: {storage.name(path.parent)}: this process was silent for so long that {owner} took the run over; "
              "this one ends", file=to_user, flush=True)
        from spin_ray.system import leave  # not at the top: it loads torch and ray

        try:
            leave(1)
        finally:
            os._exit(1)
    _write(storage, path, replace(me, seen=time.time()))


def _owner(storage: Disk, path: Path) -> Owner | None:
    record = storage.read(path).strip()
    try:
        return Owner(**json.loads(record)) if record else None
    except (ValueError, TypeError) as error:
        raise BadInput(f"{storage.name(path)}: damaged ({error}); delete it if no process works on this run") from error


def _write(storage: Disk, path: Path, owner: Owner) -> None:
    storage.overwrite(path, json.dumps(asdict(owner)).encode().ljust(_RECORD_BYTES))


def _refusal(storage: Disk, path: Path, owner: Owner | None) -> BadInput:
    who = owner or "one that has just begun"
    return BadInput(f"{storage.name(path.parent)}: another process is working on this run: {who}; follow or end that one first")


def _age(then: float) -> str:
    seconds = max(0, round(time.time() - then))
    unit, size = next((unit, size) for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)) if seconds >= 2 * size or size == 1)
    return f"{seconds // size} {unit}"


def _this_machine() -> str:
    """This start of this kernel, and the container in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _born(pid: int) -> int:
    """When a process began, in clock ticks since the machine's start; -1 for one that is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if state == "Z" else int(fields[18])
