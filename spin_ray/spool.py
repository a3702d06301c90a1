"""Records of bytes in a file without a name: as many as a disk holds, and 8 bytes of memory each."""

from __future__ import annotations

import os
import tempfile
from array import array
from pathlib import Path

from spin_ray.storage import readable_disk_errors

BUFFER_BYTES = 2**20


class Spool:
    """Append-only; any record can be read again, by any thread. The file is gone with this object, or with the process.

    A record is read with one call at its place, not through a map of the file: pages of the kernel's cache are no memory of ours.
    """

    def __init__(self, folder: Path | None = None):
        """`folder`: where there is room; None: the machine's folder for temporary files. BadInput names it when it is full."""
        self._folder = folder or Path(tempfile.gettempdir())
        with readable_disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=BUFFER_BYTES)  # noqa: SIM115
        self._ends, self._flushed = array("q", [0]), 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, *parts: bytes | memoryview | array) -> None:
        """One record of these parts."""
        with readable_disk_errors(self._folder):
            self._ends.append(self._ends[-1] + sum(map(self._file.write, parts)))

    def __getitem__(self, number: int) -> bytes:
        begin, end = self._ends[number], self._ends[number + 1]
        if end > self._flushed:
            with readable_disk_errors(self._folder):
                self._file.flush()
            self._flushed = self._ends[-1]
        return os.pread(self._file.fileno(), end - begin, begin)
