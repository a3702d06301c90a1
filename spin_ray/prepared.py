"""A run's data as token ids: made once, read again by every later session. It lies on the disk, in blocks; the driver keeps numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spin_ray.config import Config
from spin_ray.data import load_both
from spin_ray.exchange.pairs import read_prompts, stored_prompts, write_prompts, write_table
from spin_ray.lengths import Lengths
from spin_ray.manifest import RunDir
from spin_ray.model import ModelFacts
from spin_ray.preflight import FIRST_ROWS, Proof
from spin_ray.records import PROMPT_SCHEMA, Prompt, to_table
from spin_ray.terminal import Terminal


@dataclass(frozen=True)
class Prepared:
    """What the driver knows of a run's prompts."""

    block_sizes: list[int]
    lengths: Lengths
    """Of the training prompts."""
    first: Sequence[Prompt]
    """The first training prompts: for the proof at the door, and the audit."""
    heldout: Sequence[Prompt]


def prepare(config: Config, run: RunDir, facts: ModelFacts, proof: Proof, terminal: Terminal) -> Prepared:
    """Tokenise once, and prove the tokens; a resumed run reads the numbers that the first one wrote, and the few prompts it needs."""
    num_first = max(FIRST_ROWS, config.audit.num_prompts)
    if run.marks("prepared"):
        return taken_up(run, num_first)
    proof.tokens(config.data.train, config.data.split, config, facts.chat)
    loaded = load_both(config, facts.chat, terminal.say, terminal.status, run.path)
    counts = {"train": loaded.train_counts, "heldout": loaded.heldout_counts}
    return written(run, loaded.train, loaded.heldout, config.sampler.block_prompts, num_first, **counts)


def written(
    run: RunDir, train: Iterable[Prompt], heldout: Sequence[Prompt], block_prompts: int, num_first: int = FIRST_ROWS, /, **counts: Any,
) -> Prepared:
    """Put prompts, as they come, where the run reads them. `counts`: what the manifest is to remember of the rows."""
    lengths = Lengths()
    sizes, sha256 = write_prompts(run, lengths.of_all(train), block_prompts)
    write_table(run.heldout(), to_table(heldout, PROMPT_SCHEMA))
    run.storage.publish(run.prepared())
    run.mark("prepared", block_sizes=sizes, lengths=asdict(lengths), sha256=sha256, **counts)
    return taken_up(run, num_first)


def taken_up(run: RunDir, num_first: int) -> Prepared:
    """What the manifest says of the prompts, with the first ones. A run of an earlier version has its blocks read once, one by one."""
    mark = run.marks("prepared")[-1]
    sizes = mark["block_sizes"]
    if "lengths" not in mark:
        mark = {**mark, "lengths": asdict(Lengths.of(stored_prompts(run, sizes)))}
        run.mark(**mark)
    first = list(itertools.islice(stored_prompts(run, sizes), num_first))
    return Prepared(sizes, Lengths(**mark["lengths"]), first, read_prompts(run.heldout(), run.storage))
