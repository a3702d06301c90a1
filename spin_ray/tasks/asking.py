"""The sampler pool's answers to very many requests: a few thousand are under way at a time, and what comes back is in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import ray

from spin_ray.records import Completion, Likelihood, SamplingSettings, Version
from spin_ray.sampler.pool import EVALUATE

PART = 256
"""Requests in one call."""
AHEAD = 32
"""Calls under way: 8,192 requests keep 30 samplers of 256 answers each busy."""


class Answers(Protocol):
    """What a model must be able to say."""

    def likelihood(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[Likelihood]:
        """Of each (text, continuation), both [num_tokens] int32."""

    def sample(self, prompts: Iterable[np.ndarray], settings: SamplingSettings) -> list[Completion]:
        """One answer to each prompt, [num_tokens] int32."""


class PoolAnswers:
    """One version's. Requests have the urgency EVALUATE: they fill what play leaves, and wait where their version has to come back."""

    def __init__(self, pool: Any, version: Version):
        self._pool, self._version = pool, version

    def likelihood(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[Likelihood]:
        def ask(part: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any:
            texts, continuations = map(list, zip(*part, strict=True))
            return self._pool.likelihood.remote(self._version, texts, continuations, EVALUATE)

        return in_order(pairs, ask, ray.get)

    def sample(self, prompts: Iterable[np.ndarray], settings: SamplingSettings) -> list[Completion]:
        return in_order(prompts, lambda part: self._pool.sample.remote(self._version, part, settings, EVALUATE), ray.get)


def in_order(items: Iterable[Any], ask: Callable[[list[Any]], Any], result: Callable[[Any], list[Any]]) -> list[Any]:
    """The answers to all items, which are made as they go out: `ask` asks for a part of them, `result` waits for its answers."""
    items, asked, answers = iter(items), deque(), []
    while part := list(itertools.islice(items, PART)):
        if len(asked) == AHEAD:
            answers += result(asked.popleft())
        asked.append(ask(part))
    for reference in asked:
        answers += result(reference)
    return answers
