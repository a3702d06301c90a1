"""Where a run's files lie for good: on a disk, or on an object store.

All other code works on local paths. On a disk (one machine's, or NFS) they are the files themselves. On an object store a folder
under `run.scratch`, at the same path on every node, stands for the run's: what is written there is uploaded, what is read is
fetched before. A put is atomic there, but nothing can be renamed or appended to: a file is uploaded whole, a folder file by
file, and is believed only through a mark that is uploaded after it.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import functools
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from spin_ray.config import Config
from spin_ray.errors import BadInput

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ESTALE)
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_KEPT = "everything finished so far is kept"


@dataclass(frozen=True)
class Disk:
    """Files are where they are written. Pickles, and works on every node that sees the disk."""

    def name(self, path: Path) -> str:
        """What the user knows a file by."""
        return str(path)

    def fetch(self, path: Path) -> Path:
        """See to it that a file or a folder is at `path` on this node if the run has it, and not if it has not."""
        return path

    def fetch_longer(self, path: Path) -> None:
        """The same for a file that is only appended to, unless this node has more of it."""

    def publish(self, path: Path) -> None:
        """Let the run have what is at `path` on this node."""

    def exists(self, path: Path) -> bool:
        return path.exists()

    def remove(self, path: Path) -> None:
        """Remove a file or a folder that may not be there."""
        with readable_disk_errors(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @contextmanager
    def written(self, path: Path) -> Iterator[Path]:
        """Yield where to write a file that is then either not there or whole. Raises BadInput naming it if the disk is full."""
        with readable_disk_errors(path), written_whole(path) as temporary:
            yield temporary

    # A folder that several processes write: who `leads` prepares a draft, all write into it, who leads uploads it, one commits.

    def leads(self, rank: int, local_rank: int) -> bool:
        """Whether a writer does this for others: for all of them, or where nodes do not see the same disk for those on its node."""
        return rank == 0

    def draft(self, path: Path) -> Path:
        return path.parent / f".{path.name}.tmp"

    def prepare(self, path: Path) -> None:
        shutil.rmtree(self.draft(path), ignore_errors=True)  # what a process left that died while it wrote
        self.draft(path).mkdir(parents=True)

    def upload(self, path: Path) -> None:
        """Bring a node's part of the folder to where it can be committed."""

    def commit(self, path: Path) -> None:
        """Let the draft, which is done, be the folder as a whole; an earlier one gives way only then."""
        draft, old = self.draft(path), path.parent / f".{path.name}.old.tmp"
        with readable_disk_errors(path):
            for written in [*draft.rglob("*"), draft]:
                _flush(written)
            if path.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            os.replace(draft, path)
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)

    def checksums(self, folder: Path, wanted: str = "*") -> dict[str, str]:
        """SHA-256 of every file of a folder whose name fits."""
        found = {}
        for name in sorted(fnmatch.filter(self.file_names(folder), wanted)):
            with self._open(folder / name) as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def file_names(self, folder: Path) -> list[str]:
        """Files that lie in a folder, without order; none where there is no folder."""
        return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []

    def _open(self, path: Path) -> BinaryIO:
        return path.open("rb")

    def read(self, path: Path) -> bytes:
        """A small file that another process may be writing by `overwrite`; empty if it is not there."""
        return path.read_bytes() if path.exists() else b""

    def overwrite(self, path: Path, data: bytes) -> None:
        """Write a small file of unchanging size in place: at no time is it empty."""
        number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(number, data, 0)
        finally:
            os.close(number)

    def put(self, path: Path, data: bytes) -> None:
        """Put a small file into a folder that is finished."""
        with self.written(path) as temporary:
            temporary.write_bytes(data)

    def flock(self, path: Path) -> BinaryIO:
        """Lock a file against every other process that `flock` reaches, until it is closed or this process ends.

        Raises BlockingIOError if another one has it. File systems without locks are let through.
        """
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                file.close()
                raise
        return file

    def for_ray_train(self, path: Path) -> dict[str, Any]:
        """Ray Train's words for a folder that all nodes see."""
        return {"storage_path": str(path)}


DISK = Disk()


@dataclass(frozen=True)
class ObjectStore(Disk):
    """The folder `root` of this node stands for `url`, anything that pyarrow or fsspec knows; credentials are the environment's."""

    url: str
    root: Path

    def name(self, path: Path) -> str:
        return f"{self.url.partition('?')[0].rstrip('/')}/{path.relative_to(self.root).as_posix()}"

    def fetch(self, path: Path) -> Path:
        if not path.is_relative_to(self.root):  # a model that the run only starts from
            return path
        with self._readable_errors(path):
            infos = self._infos(path)
            if not infos:
                super().remove(path)
            elif self._path(infos[0]) == path:
                self._download(infos[0])
            else:
                self._fetch_folder(path, infos)
        return path

    def fetch_longer(self, path: Path) -> None:
        with self._readable_errors(path):
            for info in self._infos(path):
                if not path.exists() or path.stat().st_size < info.size:
                    self._download(info)

    def _infos(self, path: Path) -> list[pafs.FileInfo]:
        """What the store knows of a file, or of all files of a folder."""
        store, key = self._key(path)
        info = store.get_file_info(key)
        if info.type is pafs.FileType.Directory:
            return [each for each in store.get_file_info(pafs.FileSelector(key, recursive=True)) if each.is_file]
        return [info] if info.is_file else []

    def _fetch_folder(self, path: Path, infos: list[pafs.FileInfo]) -> None:
        wanted = {self._path(info) for info in infos}
        with _one_at_a_time(path):  # the players of one node want the same model at the same time
            for other in set(path.rglob("*")) - wanted:
                if other.is_file():
                    other.unlink()
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(self._download, infos))

    def _download(self, info: pafs.FileInfo) -> None:
        """Fetch a file, unless it was fetched before: a copy has the size and the time of what is in the store."""
        path, store = self._path(info), _connect(self.url)[0]
        if path.exists() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
            return
        with readable_disk_errors(path), written_whole(path) as temporary:
            pafs.copy_files(info.path, str(temporary), source_filesystem=store, destination_filesystem=pafs.LocalFileSystem())
            if info.mtime_ns:
                os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))

    def publish(self, path: Path) -> None:
        if path.exists():
            self._upload(path, path)

    def _upload(self, source: Path, path: Path) -> None:
        with self._readable_errors(path):
            store, key = self._key(path)
            pafs.copy_files(str(source), key, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=store)

    def exists(self, path: Path) -> bool:
        with self._readable_errors(path):
            return bool(self._infos(path))

    def remove(self, path: Path) -> None:
        super().remove(path)
        with self._readable_errors(path):
            store, key = self._key(path)
            info = store.get_file_info(key)
            if info.type is pafs.FileType.Directory:
                store.delete_dir(key)
            elif info.is_file:
                store.delete_file(key)

    @contextmanager
    def written(self, path: Path) -> Iterator[Path]:
        with super().written(path) as temporary:
            yield temporary
        self._upload(path, path)

    def leads(self, rank: int, local_rank: int) -> bool:
        return local_rank == 0

    def upload(self, path: Path) -> None:
        self._upload(self.draft(path), path)
        shutil.rmtree(self.draft(path))  # who needs it on this node fetches it

    def commit(self, path: Path) -> None:
        """The mark that follows does it."""

    def checksums(self, folder: Path, wanted: str = "*") -> dict[str, str]:
        with self._readable_errors(folder):
            return super().checksums(folder, wanted)

    def file_names(self, folder: Path) -> list[str]:
        with self._readable_errors(folder):
            return [self._path(info).name for info in self._infos(folder)]

    def _open(self, path: Path) -> BinaryIO:
        store, key = self._key(path)
        return store.open_input_stream(key)

    def read(self, path: Path) -> bytes:
        with self._readable_errors(path):
            return self._open(path).read() if self._infos(path) else b""

    def overwrite(self, path: Path, data: bytes) -> None:
        with self._readable_errors(path):
            store, key = self._key(path)
            with store.open_output_stream(key) as file:
                file.write(data)

    def put(self, path: Path, data: bytes) -> None:
        self.overwrite(path, data)  # not on this node's disk, where the folder may not be

    def for_ray_train(self, path: Path) -> dict[str, Any]:
        store, key = self._key(path)
        return {"storage_path": key, "storage_filesystem": store}

    def _key(self, path: Path) -> tuple[pafs.FileSystem, str]:
        store, base = _connect(self.url)
        return store, f"{base}/{path.relative_to(self.root).as_posix()}"

    def _path(self, info: pafs.FileInfo) -> Path:
        return self.root / PurePosixPath(info.path).relative_to(_connect(self.url)[1])

    @contextmanager
    def _readable_errors(self, path: Path) -> Iterator[None]:
        """Turn what an object store refuses, or cannot be asked, into one line that names the file."""
        try:
            yield
        except OSError as error:
            raise BadInput(f"{self.name(path)}: {' '.join(str(error).split())}; mend that, then run the same command: {_KEPT}") from error


def open_storage(config: Config) -> Disk:
    """The storage of a run. Raises BadInput for a URL that nothing here can read."""
    if not config.on_object_store:
        return DISK
    storage = ObjectStore(config.run.dir, config.run_path.parent)
    with storage._readable_errors(config.run_path):
        _connect(storage.url)
    return storage


@functools.cache
def _connect(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system behind a URL, pyarrow's own or else fsspec's, and the path in it."""
    try:
        store, path = pafs.FileSystem.from_uri(url)
    except pa.ArrowInvalid as error:
        try:
            store, path = pafs.FileSystem.from_uri(f"fsspec+{url}")
        except (ValueError, ImportError) as unknown:
            raise BadInput(f"run.dir={url}: no such storage: {error}; {unknown}") from error
    return store, path.rstrip("/")


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let the processes of one node take turns with a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.fetch").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the body succeeds, remove it if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise BadInput(
            f"{path}: cannot be written: {error.strerror or error}; make room or change run.dir (or run.scratch), then run the same "
            f"command: {_KEPT}"
        ) from error
