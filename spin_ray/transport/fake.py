"""A sender that breaks in the middle of a transfer: for forcing what rarely happens."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from spin_ray.exchange.weights import WeightBucket
from spin_ray.transport.sender import Sender


class FaultySender(Sender):
    """`fault`: what it does after so many tensors. It "hangs", "dies", or "raises"."""

    def __init__(self, *args: Any, fault: str, after: int, **options: Any):
        super().__init__(*args, **options)
        self._fault, self._after = fault, after

    def _source(self, buckets: Sequence[WeightBucket], second_names: Mapping[str, str]) -> Any:
        source = super()._source(buckets, second_names)
        promised, whole = source.metadata(), source._tensors
        source.metadata = lambda: promised
        source._tensors = lambda: itertools.chain(itertools.islice(whole(), self._after), self._break())
        return source

    def _break(self) -> Any:
        if self._fault == "dies":
            os._exit(1)
        if self._fault == "hangs":
            time.sleep(3600)
        raise RuntimeError("this sender was told to raise")
        yield
