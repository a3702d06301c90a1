"""A run's directory: where everything lies, and the append-only manifest that says what is finished.

Publish, then mark: data is written under a temporary name, renamed, and only then named in manifest.jsonl.
Readers believe only the mark (and a block's final name, which is a mark of its own).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin_ray.config import Config, differences, to_json
from spin_ray.errors import BadInput

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)

_MARKING = threading.Lock()
"""Threads of one process mark stages side by side; `RunDir.locked` keeps other processes out."""


class RunDir:
    """runs/<name>. `open` makes it, or takes up the one that an earlier, equal run left behind."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def open(cls, config: Config, command: str) -> RunDir:
        """Raises BadInput if the directory cannot be written or holds the work of a run with another config.

        One that holds no work yet, because an earlier try ended in bad input, is simply started over.
        """
        run = cls(config.run_path)
        saved = run.path / "config.json"
        before = json.loads(saved.read_text()) if saved.exists() else {}
        other_command = before.pop("command", command) != command
        changed = [f"command: now {command}"] * other_command + (differences(config, before) if before else [])
        if changed and run._has_work():
            raise BadInput(
                f"{run.path} belongs to a run with another config ({'; '.join(changed)}); "
                "choose another run.name, or delete the directory to start over"
            )
        with readable_disk_errors(run.path):
            run.logs.mkdir(parents=True, exist_ok=True)
            if changed:
                (run.path / "manifest.jsonl").unlink(missing_ok=True)
            if changed or not saved.exists():
                with written_whole(saved) as temporary:
                    temporary.write_text(to_json(config, command))
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this directory; the lock goes with the process, however it ends.

        Raises BadInput if another one holds it. Removes what a killed process left half-written.
        """
        with (self.path / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInput(f"{self.path}: another process is working on this run; follow or end that one first") from error
            for leftover in self.path.rglob(".*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield

    def _has_work(self) -> bool:
        return any(self.path.glob("iter_*")) or (self.path / "model").exists()

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def prompts(self, block: int) -> Path:
        return self.path / "prompts" / f"block_{block:05d}.parquet"

    def heldout(self) -> Path:
        return self.path / "prompts" / "heldout.parquet"

    def pairs(self, iteration: int, kind: str, block: int) -> Path:
        """`kind` is "block" for pairs sampled in this iteration, "replay" for re-scored ones of the iteration before."""
        return self.iteration(iteration) / "pairs" / f"{kind}_{block:05d}.parquet"

    def iteration(self, iteration: int) -> Path:
        return self.path / f"iter_{iteration:03d}"

    def model(self, iteration: int) -> Path:
        return self.iteration(iteration) / "model"

    def checkpoint(self, iteration: int) -> Path:
        return self.iteration(iteration) / "checkpoint"

    def progress(self, iteration: int) -> Path:
        """The main player in the middle of an iteration."""
        return self.iteration(iteration) / "progress"

    def mark_checksums(self, iteration: int) -> None:
        """Remember what the files of an iteration's model contain."""
        self.mark("checksums", iteration=iteration, sha256=checksums(self.model(iteration)))

    def check_model(self, iteration: int) -> None:
        """Raise BadInput, naming the file, if a model's file is not what it was when the run wrote it."""
        known = [mark["sha256"] for mark in self.marks("checksums") if mark["iteration"] == iteration]
        if not known:
            return self.mark_checksums(iteration)  # a crash came between the iteration's mark and this one
        found = checksums(self.model(iteration))
        for name, value in known[-1].items():
            if found.get(name) != value:
                raise BadInput(
                    f"{self.model(iteration) / name}: missing or damaged since this run wrote it (sha256 {found.get(name)}, "
                    f"was {value}); put the file back, or start a new run"
                )

    def drop_outdated(self) -> None:
        """Remove what finished iterations no longer need: their progress, and every checkpoint but the newest."""
        finished = len(self.marks("iteration"))
        for t in range(finished):
            for path in [self.progress(t), *([self.checkpoint(t)] if t < finished - 1 else [])]:
                shutil.rmtree(path, ignore_errors=True)

    def mark(self, stage: str, **facts: Any) -> None:
        """Append one line to the manifest, whole and on disk when this returns."""
        line = json.dumps({"stage": stage, **facts}) + "\n"
        with _MARKING, readable_disk_errors(self.path), (self.path / "manifest.jsonl").open("a+b") as manifest:
            manifest.seek(0)
            manifest.truncate(manifest.read().rfind(b"\n") + 1)  # a line that a crash cut short
            manifest.write(line.encode())
            manifest.flush()
            os.fsync(manifest.fileno())

    def marks(self, stage: str) -> list[dict[str, Any]]:
        """Lines of this stage, oldest first; a line cut by a crash is not believed."""
        manifest = self.path / "manifest.jsonl"
        lines = manifest.read_text().splitlines(keepends=True) if manifest.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        return [entry for entry in entries if entry["stage"] == stage]


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the body succeeds, remove it if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        if temporary.is_dir():
            flush_folder(temporary)
            replace_folder(temporary, path)
        else:
            _flush(temporary)
            os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Have a folder's files on disk, not only in the system's memory."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; one that is there gives way only then."""
    old = path.parent / f".{path.name}.old.tmp"
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise BadInput(
            f"{path}: cannot be written: {error.strerror or error}; make room or change run.dir, then run the same command: "
            "everything finished so far is kept"
        ) from error
