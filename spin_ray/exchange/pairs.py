"""Blocks of pairs: the unit of work, of durability and of streaming.

One Ray Data pipeline per iteration: a row per block -> `play_block` -> the block's pairs, in order. A block that is on
disk is read, otherwise it is played by the sampler pool and written under a temporary name, then renamed: the file IS
the commit. So the same expression serves a first run, a resumed one and a restarted learner (invariant 5).

The blocks go to the learner as references, every rank sees all of them in the same order. Why not `streaming_split`:
with equal=True it drops rows, with equal=False ranks run out at different times and hang their collectives, and either
way the batches depend on the number of workers. Pairs are token ids: all of an iteration is a few hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from spin_ray.manifest import RunDir, readable_disk_errors, written_whole
from spin_ray.placement import PLAY_TASK_CPUS
from spin_ray.records import PAIR_SCHEMA, PROMPT_SCHEMA, Completion, Pair, Prompt, SamplingSettings, from_table, to_table


@dataclass(frozen=True)
class BlockSpec:
    """One block of one iteration."""

    kind: str
    """"block": sampled in this iteration; "replay": the iteration before's, re-scored."""
    index: int
    size: int
    """Pairs in the block."""


@dataclass(frozen=True)
class PlayPlan:
    """What a play task needs besides the block's number."""

    run: RunDir
    pool: Any
    iteration: int
    settings: SamplingSettings

    @property
    def version(self) -> int:
        """theta_t plays and scores iteration t."""
        return self.iteration


def write_prompts(run: RunDir, prompts: Sequence[Prompt], block_prompts: int) -> list[int]:
    """Cut the prepared prompts into blocks on disk; returns the blocks' sizes."""
    parts = [prompts[start : start + block_prompts] for start in range(0, len(prompts), block_prompts)]
    for index, part in enumerate(parts):
        write_table(run.prompts(index), to_table(part, PROMPT_SCHEMA))
    return [len(part) for part in parts]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file that is either not there or whole. Raises BadInput naming the file if the disk is full."""
    with readable_disk_errors(path), written_whole(path) as temporary:
        pq.write_table(table, temporary)


def blocks_of_iteration(iteration: int, sizes: Sequence[int], *, replay: bool) -> list[BlockSpec]:
    """The iteration's blocks in the order of training: replay first, it is ready in seconds while the rest is sampled."""
    kinds = ["replay", "block"] if replay and iteration > 0 else ["block"]
    return [BlockSpec(kind, index, size) for kind in kinds for index, size in enumerate(sizes)]


def play(plan: PlayPlan, blocks: Sequence[BlockSpec], num_tasks: int) -> Iterator[pa.Table]:
    """Play an iteration's blocks with up to `num_tasks` in flight; yields their pairs in the order of `blocks`."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the batches must not depend on which block is ready first
    rows = [{"kind": block.kind, "index": block.index} for block in blocks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        play_block, fn_kwargs={"plan": plan}, batch_size=1, num_cpus=PLAY_TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=num_tasks), batch_format="numpy",
    )
    for block, table in zip(blocks, dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0), strict=True):
        _check_block(plan, block, table)
        yield table


def play_block(row: dict[str, np.ndarray], plan: PlayPlan) -> pa.Table:
    """The pairs of one block: from disk if they are there, otherwise played and written."""
    kind, index = str(row["kind"][0]), int(row["index"][0])
    path = plan.run.pairs(plan.iteration, kind, index)
    if not path.exists():
        pairs = {"block": sample_pairs, "replay": rescore_pairs}[kind](plan, index)
        write_table(path, to_table(pairs, PAIR_SCHEMA))
    return pq.read_table(path, schema=PAIR_SCHEMA)


def sample_pairs(plan: PlayPlan, index: int) -> list[Pair]:
    """Algorithm 1, lines 3-5: the opponent answers every prompt, and scores its own answer and the real one."""
    prompts: list[Prompt] = from_table(pq.read_table(plan.run.prompts(index)), Prompt)
    questions, answers = [p.prompt_ids for p in prompts], [p.real_ids for p in prompts]
    drawn = plan.pool.sample.remote(plan.version, questions, plan.settings)
    scored = plan.pool.score.remote(plan.version, questions, answers)
    completions, real_logps = ray.get([drawn, scored])
    return [_pair(plan, *parts) for parts in zip(prompts, completions, real_logps, strict=True)]


def _pair(plan: PlayPlan, prompt: Prompt, completion: Completion, real_logps: np.ndarray) -> Pair:
    return Pair(
        prompt.prompt_id, plan.iteration, completion.version, plan.version, prompt.prompt_ids, prompt.real_ids,
        completion.token_ids, real_logps, completion.logps, completion.finish_reason,
    )


def rescore_pairs(plan: PlayPlan, index: int) -> list[Pair]:
    """The pairs of iteration t - 1 with the present opponent's log-probs, by two prefills each."""
    path = plan.run.pairs(plan.iteration - 1, "block", index)
    pairs: list[Pair] = from_table(pq.read_table(path, schema=PAIR_SCHEMA), Pair)
    questions = [pair.prompt_ids for pair in pairs]
    real = plan.pool.score.remote(plan.version, questions, [pair.real_ids for pair in pairs])
    generated = plan.pool.score.remote(plan.version, questions, [pair.generated_ids for pair in pairs])
    return [
        replace(
            pair, iteration=plan.iteration, scored_version=plan.version,
            opponent_real_logps=real_logps, opponent_generated_logps=generated_logps,
        )
        for pair, real_logps, generated_logps in zip(pairs, *ray.get([real, generated]), strict=True)
    ]


def _check_block(plan: PlayPlan, block: BlockSpec, table: pa.Table) -> None:
    """Invariant 3: both versions of a pair are t; a replayed pair was written by t - 1."""
    writer = plan.version - (block.kind == "replay")
    wanted = {"iteration": {plan.iteration}, "opponent_version": {writer}, "scored_version": {plan.version}}
    found = {name: set(table.column(name).to_pylist()) for name in wanted}
    if found != wanted or len(table) != block.size:
        path = plan.run.pairs(plan.iteration, block.kind, block.index)
        raise RuntimeError(f"{path}: expected {block.size} pairs with {wanted}, found {len(table)} with {found}")


def stream_to_learner(tables: Iterator[pa.Table], put_block: Callable[[int, Any], None], note: Callable[[pa.Table], None]) -> None:
    """Hand every finished block on as an object reference, in order; `note` sees each for the metrics."""
    for index, table in enumerate(tables):
        put_block(index, [ray.put(table)])
        note(table)
