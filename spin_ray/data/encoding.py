"""Rows -> token ids: what becomes of each row, and many rows side by side.

A row's fate depends on nothing but the row. So batches of rows may go to other processes, and come back in the order of the source: counts,
errors and their places are those of one process.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from spin_ray.background import end_with, in_background
from spin_ray.chat import ChatFormat
from spin_ray.config import DataConfig
from spin_ray.data.choice import Chosen, choose, choose_preference
from spin_ray.data.rows import read_dialogue
from spin_ray.errors import BadInput, RunStopped

BATCH_ROWS = 500
SERIAL_BATCHES = 60
"""Batches before other processes are worth the seconds that they take to start."""
MOST_PROCESSES = 8
"""More do not help: one process reads the rows of all."""
Row = tuple[str, Any]
"""Its place in the source, and what stands there."""
Ids = tuple[Sequence[int], ...]
"""Prompt, answer, and in preference rows the rejected answer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row that is a dialogue."""

    ids: list[Ids | ValueError]
    """Of each chosen turn, or what is wrong with it."""
    answer: str | None
    """What a right reply must say."""
    ignored: list[str]
    skipped: Counter[str]
    from_chosen: bool
    """Whether the answer was the better one of two, and the other one is left out."""


@dataclass(frozen=True)
class Encoder:
    """Pickles, as long as its tokenizer does."""

    chat: ChatFormat
    config: DataConfig
    preferences: bool

    def encode(self, rows: Sequence[Row]) -> tuple[list[Encoded | ValueError], Counter[str]]:
        """What becomes of each row, tokenised in one call; and what the chat format has to say of the dialogues."""
        notes: Counter[str] = Counter()
        read = [chosen_of(row, self.config, self.preferences) for _, row in rows]
        requests = [request for chosen in read if isinstance(chosen, Chosen) for request in chosen.requests()]
        made = iter(self.chat.encode_many(requests, notes))
        return [_plain(chosen) if isinstance(chosen, ValueError) else _encoded(chosen, made) for chosen in read], notes


def chosen_of(row: Mapping[str, Any], config: DataConfig, preferences: bool) -> Chosen | ValueError:
    """The turns of a row that become y, or why it has none."""
    try:
        dialogue = read_dialogue(row, config.ignore_columns, preferences=preferences)
        return choose_preference(dialogue) if preferences else choose(dialogue, config.turns)
    except ValueError as error:
        return error


def _encoded(chosen: Chosen, made: Iterator[Ids | ValueError]) -> Encoded:
    ids = [chosen.problem(place) or next(made) for place in chosen.places]
    if chosen.rejected:
        ids = [_preference(*ids, chosen.rejected.problem(chosen.rejected.places[0]) or next(made))]
    dialogue = chosen.dialogue
    from_chosen = dialogue.preferred and not chosen.rejected
    return Encoded([_plain(one) for one in ids], dialogue.answer, dialogue.ignored, chosen.skipped, from_chosen)


def _plain(value: Ids | ValueError) -> Ids | ValueError:
    """An error as its text alone: not every kind of it can be sent."""
    return ValueError(str(value)) if isinstance(value, ValueError) else value


def _preference(better: Ids | ValueError, worse: Ids | ValueError) -> Ids | ValueError:
    """(prompt, chosen, rejected) of two encoded answers, or what is wrong with them."""
    if isinstance(better, ValueError):
        return better
    if isinstance(worse, ValueError):
        return ValueError(f"rejected: {worse}")
    if list(better[0]) != list(worse[0]):
        return ValueError("the chat template renders another prompt before the rejected answer than before the chosen one")
    return *better, worse[1]


Batch = tuple[list[str], list[Encoded | ValueError], Counter[str]]
"""Places of rows, what becomes of each, and notes."""


def encoded(encoder: Encoder, rows: Iterator[Row], num_processes: int) -> Iterator[Batch]:
    """All rows in their order, a batch at a time; from the first `SERIAL_BATCHES` on by other processes, if there are to be several."""
    batches = _batches(rows)
    for batch in itertools.islice(batches, SERIAL_BATCHES if num_processes > 1 else None):
        yield [where for where, _ in batch], *encoder.encode(batch)
    if (batch := next(batches, None)) is not None:
        yield from _side_by_side(encoder, itertools.chain([batch], batches), num_processes)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """A row that cannot be read is told only when those before it have had their turn: one of them may be refused."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                yield batch
                batch = []
    except BadInput:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _side_by_side(encoder: Encoder, batches: Iterable[list[Row]], num_processes: int) -> Iterator[Batch]:
    """At most three batches for each process are under way, so what waits does not grow with the source."""
    under_way: deque[tuple[list[str], Future]] = deque()
    processes = ProcessPoolExecutor(
        num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(encoder,)
    )
    unreadable = None
    try:
        for batch in _or_error(batches):
            if isinstance(batch, BadInput):
                unreadable = batch
            else:
                under_way.append(([where for where, _ in batch], processes.submit(_encode, batch)))
            if len(under_way) >= 3 * num_processes:
                yield _next(under_way)
        while under_way:
            yield _next(under_way)
    except BrokenProcessPool as error:
        raise RunStopped(
            "a process that tokenises rows was ended, perhaps for want of memory; data.num_processes=1 does without, and with less memory"
        ) from error
    finally:
        processes.shutdown(cancel_futures=True)
    if unreadable:
        raise unreadable


def _or_error(batches: Iterable[list[Row]]) -> Iterator[list[Row] | BadInput]:
    """The batches; in place of the first that cannot be read, and of all behind it, what is wrong."""
    try:
        yield from batches
    except BadInput as error:
        yield error


def _next(under_way: deque[tuple[list[str], Future]]) -> Batch:
    places, future = under_way.popleft()
    return places, *future.result()


def processes_for(chat: ChatFormat, wanted: int) -> int:
    """How many processes tokenise: what is asked for, or as many as cores are free; one where a tokenizer's own code cannot be sent."""
    sendable = type(chat.tokenizer).__module__.startswith("transformers.")
    return (wanted or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))) if sendable else 1


_encoder: Encoder
"""Of a process that does nothing else."""


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started them ends them
    in_background(end_with, os.getppid(), threading.Event())  # a driver that is killed ends nobody: they would wait for rows for ever


def _encode(rows: list[Row]) -> tuple[list[Encoded | ValueError], Counter[str]]:
    return _encoder.encode(rows)
