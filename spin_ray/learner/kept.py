"""An iteration's examples, kept for its later epochs: on the node's own disk, not in the memory of every rank."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import numpy as np

from spin_ray.records import Pair
from spin_ray.spool import Spool

Example = tuple[Pair, np.ndarray]
"""A pair with its references: log p of its answers' parts under theta_t, and perhaps theta_0, [1 or 2, 3, 2] float64, in nats."""
_FIELDS = attrgetter(*(field.name for field in dataclasses.fields(Pair)))


class Kept:
    """Examples by their number, 8 bytes of memory each: what is read again is, bit by bit, what was kept.

    They lie in the machine's folder for temporary files (TMPDIR says another one), about 8 bytes for each token of an answer and 4 for each
    of a prompt, and are gone with this object.
    """

    def __init__(self) -> None:
        self._spool = Spool()

    def __len__(self) -> int:
        return len(self._spool)

    def extend(self, examples: Iterable[Example]) -> None:
        for pair, references in examples:
            values = [_flat(value) if isinstance(value, np.ndarray) else value for value in (*_FIELDS(pair), references)]
            self._spool.append(pickle.dumps(values, pickle.HIGHEST_PROTOCOL))

    def __getitem__(self, number: int) -> Example:
        *fields, references = (_array(*value) if isinstance(value, tuple) else value for value in pickle.loads(self._spool[number]))
        return Pair(*fields), references


def _flat(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """An array as pickle writes it in a thirtieth of the time."""
    return array.dtype.str, array.shape, array.tobytes()


def _array(dtype: str, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape)


def once_all_are_there(blocks: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """The blocks of examples; returns when the last one has come."""
    kept, ends = Kept(), [0]
    for block in blocks:
        kept.extend(block)
        ends.append(len(kept))
    return ([kept[number] for number in range(begin, end)] for begin, end in itertools.pairwise(ends))
