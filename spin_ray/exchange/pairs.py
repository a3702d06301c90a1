"""Blocks of pairs: the unit of work, of durability and of streaming.

One Ray Data pipeline per run: a row per block -> `PlayBlock` -> the block's pairs, in order. A block that is on disk is
read, otherwise it is played by the sampler pool and written under a temporary name, then renamed: the file IS the
commit. So the same expression serves a first run and a resumed one (invariant 5). Blocks of later iterations stand in
the pipeline early and wait at the pool for their version: when its weights arrive, nothing has to start up.

No pair passes through the driver: it hears what a block holds (`Played`), and tells the learner where it lies (`Stored`). Every rank
reads all of them in the same order. Why not `streaming_split`: with equal=True it drops rows, with equal=False ranks run out at
different times and hang their collectives, and either way the batches depend on the number of workers. And a learner that cannot reach
the samplers' nodes still reads what they have written.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from spin_ray.errors import BadInput, Diverged
from spin_ray.manifest import RunDir
from spin_ray.overlap import BlockSpec
from spin_ray.placement import PLAY_TASK_CPUS, play_processes
from spin_ray.records import (
    NO_LOGPS,
    NO_TOKENS,
    PAIR_SCHEMA,
    PROMPT_SCHEMA,
    Completion,
    Pair,
    Prompt,
    SamplingSettings,
    Version,
    digest,
    from_table,
    to_table,
)
from spin_ray.sampler.pool import PLAY
from spin_ray.storage import DISK, Disk


@dataclass(frozen=True)
class PlayPlan:
    """What playing a block needs besides the block."""

    run: RunDir
    pool: Any
    settings: Sequence[SamplingSettings]
    """Of every iteration."""
    score: bool = True
    """Whether the opponent computes the references; if not, the learner does, and the pairs carry none."""
    max_steps_early: int = 0
    """How stale a pair may be: 0 but in `lookahead`."""
    anchored: bool = False
    """Whether pairs also carry what theta_0 answered."""


@dataclass(frozen=True)
class Played:
    """What the driver hears of a finished block."""

    num_pairs: int
    num_drawn: int
    """Tokens of the answers in it."""
    sha256: bytes
    """Of its prompts' numbers and generated answers."""


@dataclass(frozen=True)
class Stored:
    """Where the pairs of a block lie."""

    path: Path
    storage: Disk

    def pairs(self) -> list[Pair]:
        """Raises BadInput if they are damaged, or not there within `LATE_FILE_S`: a shared disk may show a new file a moment late."""
        until = time.monotonic() + LATE_FILE_S
        while not self.storage.exists(self.path) and time.monotonic() < until:
            time.sleep(0.2)
        return from_table(read_pairs(self.path, self.storage), Pair)


@dataclass(frozen=True)
class StoredRows:
    """Rows that are the pairs themselves: prompts that a method makes pairs of."""

    path: Path
    storage: Disk
    method: Any

    def pairs(self) -> list[Pair]:
        return [self.method.pair(prompt) for prompt in read_prompts(self.path, self.storage)]


@dataclass(frozen=True)
class Given:
    """Pairs that lie nowhere yet."""

    given: tuple[Pair, ...]

    def pairs(self) -> list[Pair]:
        return list(self.given)


LATE_FILE_S = 60.0


def write_prompts(run: RunDir, prompts: Iterable[Prompt], block_prompts: int) -> tuple[list[int], str]:
    """Cut the prepared prompts, as they come, into blocks on disk; returns the blocks' sizes, and a SHA-256 of all token ids in order."""
    coming, sizes, ids = iter(prompts), [], hashlib.sha256()
    while part := list(itertools.islice(coming, block_prompts)):
        table = to_table(part, PROMPT_SCHEMA)
        write_table(run.prompts(len(sizes)), table)
        ids.update(digest(table, ("prompt_ids", "real_ids", "rejected_ids")))
        sizes.append(len(part))
    return sizes, ids.hexdigest()


def stored_prompts(run: RunDir, block_sizes: Sequence[int]) -> Iterator[Prompt]:
    """A run's prompts in their order, a block at a time in memory."""
    for index in range(len(block_sizes)):
        yield from read_prompts(run.prompts(index), run.storage)


def write_table(path: Path, table: pa.Table, storage: Disk = DISK) -> None:
    """Write a Parquet file that is either not there or whole. Raises BadInput naming the file if the disk is full."""
    with storage.written(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_prompts(path: Path, storage: Disk = DISK) -> list[Prompt]:
    """The prompts of a file that `write_table` wrote. Raises BadInput naming it if it is damaged."""
    storage.fetch(path)
    return from_table(_read_table(path, storage, PROMPT_SCHEMA, "these prompts are damaged", "the file must be put back"), Prompt)


def read_pairs(path: Path, storage: Disk = DISK) -> pa.Table:
    """The pairs of a block. Raises BadInput naming the file if its bytes are not those that were written."""
    storage.fetch(path)
    return _read_pairs(path, storage)


def _read_pairs(path: Path, storage: Disk) -> pa.Table:
    remedy = "one of the present iteration is played again by itself, one of an earlier iteration must be put back"
    return _read_table(path, storage, PAIR_SCHEMA, "this block of pairs is damaged", remedy)


def _read_table(path: Path, storage: Disk, schema: pa.Schema, complaint: str, remedy: str) -> pa.Table:
    """A file that has been fetched."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # `read_table` brings along a query engine, 40 MiB
            return file.read(use_threads=False).select(schema.names).cast(schema)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise BadInput(f"{storage.name(path)}: {complaint} ({str(error).splitlines()[0]}); {remedy}") from error


def pairs_on_disk(path: Path, storage: Disk = DISK) -> pa.Table | None:
    """The pairs of a block that is finished and whole; None for one that has to be played, also because a disk has damaged it."""
    if not storage.fetch(path).exists():
        return None
    try:
        return _read_pairs(path, storage)
    except BadInput as error:
        logging.getLogger(__name__).warning("%s", error)
        return None


def play(plan: PlayPlan, blocks: Sequence[BlockSpec], num_in_flight: int) -> Iterator[tuple[BlockSpec, Played]]:
    """Play blocks with up to `num_in_flight` at a time; yields each when it is written, in the order of `blocks`."""
    if not blocks:  # a run that was cut off behind its last iteration; Ray Data knows no empty pipeline
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # a thread per block that reads /proc every second: with hundreds in flight, a core
    context.execution_options.preserve_order = True  # the batches must not depend on which block is ready first
    processes = play_processes(num_in_flight)
    blocks_per_process = -(-num_in_flight // processes)
    dataset = ray.data.from_items([{"place": place} for place in range(len(blocks))], override_num_blocks=len(blocks)).map_batches(
        PlayBlock, fn_constructor_args=(plan, list(blocks)), batch_size=1, batch_format="numpy", num_cpus=PLAY_TASK_CPUS,
        compute=ray.data.ActorPoolStrategy(
            size=processes, max_tasks_in_flight_per_actor=blocks_per_process, max_concurrent_calls_per_actor=blocks_per_process
        ),
    )
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for block, table in zip(blocks, tables, strict=True):
        yield block, from_table(table, Played)[0]


class PlayBlock:
    """The stage of the pipeline: the pairs of a block are on disk, or they are played and written. Returns what was `Played`.

    Awaits its answers: a thread in `ray.get` wakes up every second to look for signals, and hundreds of blocks wait at a time.
    """

    def __init__(self, plan: PlayPlan, blocks: Sequence[BlockSpec]):
        self._plan, self._blocks = plan, blocks

    async def __call__(self, row: dict[str, np.ndarray]) -> pa.Table:
        plan, block = self._plan, self._blocks[int(row["place"][0])]
        storage, path = plan.run.storage, plan.run.pairs(block.iteration, block.kind, block.index)
        if (finished := await asyncio.to_thread(pairs_on_disk, path, storage)) is not None:
            return _checked(plan, block, finished)
        await plan.pool.released.remote(block.version)  # a replayed block's pairs are all on disk by then
        pairs = await (rescore_pairs if block.age else sample_pairs)(plan, block)
        table = to_table(await with_anchors(plan, block, pairs) if plan.anchored else pairs, PAIR_SCHEMA)
        check_logps(block, table)
        await asyncio.to_thread(write_table, path, table, storage)
        return _checked(plan, block, table)


async def sample_pairs(plan: PlayPlan, block: BlockSpec) -> list[Pair]:
    """Algorithm 1, lines 3-5: the opponent answers every prompt, and scores its own answer and, where replay has not, the real one."""
    prompts = await asyncio.to_thread(read_prompts, plan.run.prompts(block.index), plan.run.storage)
    questions, settings = [p.prompt_ids for p in prompts], plan.settings[block.iteration]
    real_logps = await _known_real(plan, block, prompts) if plan.score else [NO_LOGPS] * len(prompts)
    if real_logps is None:
        real = [p.real_ids for p in prompts]
        answered = await plan.pool.play.remote(block.version, questions, settings, real, PLAY, block.place)
    else:
        completions = await plan.pool.sample.remote(block.version, questions, settings, PLAY, block.place)
        answered = zip(completions, real_logps, strict=True)
    return [_pair(block, p, c, real, c.logps if plan.score else NO_LOGPS) for p, (c, real) in zip(prompts, answered, strict=True)]


async def _known_real(plan: PlayPlan, block: BlockSpec, prompts: Sequence[Prompt] | Sequence[Pair]) -> list[np.ndarray] | None:
    """The real answers' log-probs, if this iteration's latest replay of the same prompts, which comes first, has them."""
    replayed = await asyncio.to_thread(_replayed, plan, block)
    known = {pair.prompt_id: pair.opponent_real_logps for pair in replayed if _scored_by(pair) == block.version}
    return [known[prompt.prompt_id] for prompt in prompts] if all(prompt.prompt_id in known for prompt in prompts) else None


async def _score_real(plan: PlayPlan, block: BlockSpec, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """The real answers' log-probs: known ones, or by a prefill each."""
    known = await _known_real(plan, block, pairs)
    return known or await _score(plan, block, [p.prompt_ids for p in pairs], [p.real_ids for p in pairs])


async def _score(plan: PlayPlan, block: BlockSpec, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
    return await plan.pool.score.remote(block.version, prompts, answers, PLAY, block.place)


def _replayed(plan: PlayPlan, block: BlockSpec) -> list[Pair]:
    """The pairs of the same prompts that this iteration replays from the one before, if they are finished."""
    if not plan.run.has_pairs(block.iteration, "replay", block.index):  # to fetch what is still on its way would remove it here
        return []
    table = pairs_on_disk(plan.run.pairs(block.iteration, "replay", block.index), plan.run.storage)
    return [] if table is None else from_table(table, Pair)


def _scored_by(pair: Pair) -> Version:
    return Version(pair.scored_version, pair.scored_steps_early)


def _pair(block: BlockSpec, prompt: Prompt, completion: Completion, real_logps: np.ndarray, generated_logps: np.ndarray) -> Pair:
    early = completion.version.steps_early
    scored_early = early if len(generated_logps) else 0
    return Pair(
        prompt.prompt_id, block.iteration, completion.version.number, block.version.number, prompt.prompt_ids, prompt.real_ids,
        completion.token_ids, real_logps, generated_logps, completion.finish_reason, opponent_steps_early=early,
        scored_steps_early=scored_early,
    )


async def rescore_pairs(plan: PlayPlan, block: BlockSpec) -> list[Pair]:
    """The pairs of an earlier iteration with the present opponent's log-probs: a prefill for y where no other replay has it, and one
    for y' where that is not y.
    """
    pairs = await _written(plan, block, block.iteration - block.age)
    real = generated = [NO_LOGPS] * len(pairs)
    if plan.score:
        same = [np.array_equal(pair.real_ids, pair.generated_ids) for pair in pairs]
        others = [pair for pair, is_same in zip(pairs, same, strict=True) if not is_same]
        real, of_others = await asyncio.gather(
            _score_real(plan, block, pairs), _score(plan, block, [p.prompt_ids for p in others], [p.generated_ids for p in others])
        )
        scored = iter(of_others)
        generated = [logp if is_same else next(scored) for logp, is_same in zip(real, same, strict=True)]
    return [
        replace(
            pair, iteration=block.iteration, scored_version=block.version.number, scored_steps_early=0,
            opponent_real_logps=real_logps, opponent_generated_logps=generated_logps,
        )
        for pair, real_logps, generated_logps in zip(pairs, real, generated, strict=True)
    ]


async def with_anchors(plan: PlayPlan, block: BlockSpec, pairs: list[Pair]) -> list[Pair]:
    """The pairs with what theta_0 answered to their prompts, and its log-probs; without, where y' is that answer."""
    if block.iteration == block.age:
        return pairs  # theta_0 wrote them
    first = {pair.prompt_id: pair.generated_ids for pair in await _written(plan, block, 0)}
    others = [pair for pair in pairs if not np.array_equal(first[pair.prompt_id], pair.generated_ids)]
    anchors = [first[pair.prompt_id] for pair in others]
    logps = await _score(plan, block, [p.prompt_ids for p in others], anchors) if plan.score else [NO_LOGPS] * len(others)
    known = {p.prompt_id: (ids, logp) for p, ids, logp in zip(others, anchors, logps, strict=True)}
    none = NO_TOKENS, NO_LOGPS
    found = [known.get(pair.prompt_id, none) for pair in pairs]
    return [replace(pair, anchor_ids=ids, opponent_anchor_logps=logp) for pair, (ids, logp) in zip(pairs, found, strict=True)]


async def _written(plan: PlayPlan, block: BlockSpec, iteration: int) -> list[Pair]:
    """The pairs of the same prompts that an iteration's own opponent wrote."""
    path = plan.run.pairs(iteration, "block", block.index)
    return from_table(await asyncio.to_thread(read_pairs, path, plan.run.storage), Pair)


def check_logps(block: BlockSpec, table: pa.Table) -> None:
    """Raise Diverged for a block in which a log-prob of the opponent is not a number: it must not be written, or trained on."""
    for name in ("opponent_real_logps", "opponent_generated_logps", "opponent_anchor_logps"):
        numbers = np.isfinite(table.column(name).combine_chunks().flatten())
        if not numbers.all():
            raise Diverged(
                f"iteration {block.iteration}, {block.kind} {block.index}: {np.sum(~numbers)} of {len(numbers)} {name} are not numbers; "
                f"look at the weights of {block.version}, which gave them"
            )


def _checked(plan: PlayPlan, block: BlockSpec, table: pa.Table) -> pa.Table:
    """What was `Played`, of pairs that are what they should be."""
    _check_block(plan, block, table)
    num_drawn = pc.sum(pc.list_value_length(table.column("generated_ids"))).as_py()
    return pa.table({"num_pairs": [len(table)], "num_drawn": [num_drawn], "sha256": [digest(table, ("prompt_id", "generated_ids"))]})


def _check_block(plan: PlayPlan, block: BlockSpec, table: pa.Table) -> None:
    """Invariant 3: a pair of iteration t was written and scored by version t, a replayed one written by an earlier one."""
    t = block.iteration
    wanted = {"iteration": {t}, "opponent_version": {t - block.age}, "scored_version": {t}}
    found = {name: set(table.column(name).to_pylist()) for name in wanted}
    early = max(table.column("opponent_steps_early").to_pylist(), default=0)
    if found != wanted or len(table) != block.size or early > plan.max_steps_early:
        name = plan.run.storage.name(plan.run.pairs(t, block.kind, block.index))
        raise RuntimeError(
            f"{name}: expected {block.size} pairs with {wanted}, at most {plan.max_steps_early} steps early, "
            f"found {len(table)} with {found}, {early} steps early"
        )
