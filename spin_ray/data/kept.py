"""What is kept of a source's rows while it is read: token ids on the disk, and a few bytes a row in memory.

| bytes of a row in memory | what for |
|---|---|
| 8 | where its ids lie on the disk |
| 16, and while arrays are merged as many again | that a later row may be its duplicate |
| 8, when all rows are read | its place in the shuffled order |
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import overload

import numpy as np

from spin_ray.records import Prompt
from spin_ray.spool import Spool

RECENT = 2**16
"""Digests in a set, 100 bytes each, before they become 16 bytes in an array."""
_NUM_LENGTHS = 4


class KeptRows:
    """Rows as token ids, in the order of their source, and what tells that one has been there before."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where there is room for all of them, 4 bytes a token."""
        self._spool, self._seen = Spool(folder), Seen()

    def __len__(self) -> int:
        return len(self._spool)

    def is_new(self, *parts: Sequence[int]) -> bool:
        """Whether a row's prompt, answer and rejected answer have not been there before; from now on they have."""
        return self._seen.add(digest(*parts))

    def append(self, answer: str | None, *parts: Sequence[int]) -> None:
        text = b"" if answer is None else answer.encode()
        lengths = [*map(len, parts), -1 if answer is None else len(text)]
        self._spool.append(array("i", itertools.chain(lengths, *parts)).tobytes(), text)

    def prompts(self, order: np.ndarray) -> Prompts:
        """The rows at these places."""
        return Prompts(self._spool, order)


class Prompts(Sequence[Prompt]):
    """Prompts in a run's order, each read from the disk when it is asked for."""

    def __init__(self, spool: Spool, order: np.ndarray):
        self._spool, self._order = spool, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...

    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        return _prompt(range(len(self))[place], self._spool[int(self._order[place])])


def _prompt(prompt_id: int, record: bytes) -> Prompt:
    *lengths, text = np.frombuffer(record, np.int32, _NUM_LENGTHS).tolist()
    borders = [_NUM_LENGTHS, *itertools.accumulate(lengths, initial=_NUM_LENGTHS)][1:]
    ids = np.frombuffer(record, np.int32, borders[-1])
    prompt_ids, real_ids, rejected_ids = (ids[begin:end] for begin, end in itertools.pairwise(borders))
    return Prompt(prompt_id, prompt_ids, real_ids, None if text < 0 else record[4 * borders[-1] :].decode(), rejected_ids)


class Seen:
    """A set of digests, 16 bytes each: sorted arrays, every one longer than the next, and a set of the newest."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []
        self._recent: set[bytes] = set()

    def add(self, key: bytes) -> bool:
        """Whether it was not there."""
        if key in self._recent or any(_holds(keys, key) for keys in self._sorted):
            return False
        self._recent.add(key)
        if len(self._recent) >= RECENT:
            self._settle()
        return True

    def _settle(self) -> None:
        """The newest become an array, which those that are no longer join."""
        keys = np.array(list(self._recent), "S16")
        self._recent = set()
        while self._sorted and len(self._sorted[-1]) <= len(keys):
            keys = np.concatenate([self._sorted.pop(), keys])
        keys.sort()
        self._sorted.append(keys)


def _holds(keys: np.ndarray, key: bytes) -> bool:
    place = keys.searchsorted(np.bytes_(key))
    return bool(place < len(keys) and keys[place] == key.rstrip(b"\0"))  # numpy compares, and gives back, texts without zeros at their ends


def digest(*parts: Sequence[int]) -> bytes:
    """16 bytes that stand for a prompt and its answers; two of a billion rows have the same with a chance of 1e-21."""
    return blake2b(array("i", itertools.chain(map(len, parts), *parts)).tobytes(), digest_size=16).digest()
