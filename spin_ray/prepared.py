"""A run's data as token ids: made once, read again by every later session."""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.config import Config
from spin_ray.data import load_both
from spin_ray.exchange.pairs import read_prompts, write_prompts, write_table
from spin_ray.manifest import RunDir
from spin_ray.model import ModelFacts
from spin_ray.preflight import Proof
from spin_ray.records import PROMPT_SCHEMA, Prompt, to_table
from spin_ray.terminal import Terminal


@dataclass(frozen=True)
class Prepared:
    train: list[Prompt]
    heldout: list[Prompt]
    block_sizes: list[int]


def prepare(config: Config, run: RunDir, facts: ModelFacts, proof: Proof, terminal: Terminal) -> Prepared:
    """Tokenise once, and prove the tokens; a resumed run reads what the first one wrote."""
    marks = run.marks("prepared")
    if marks:
        sizes = marks[0]["block_sizes"]
        run.storage.fetch(run.prepared())
        train = [prompt for index in range(len(sizes)) for prompt in read_prompts(run.prompts(index))]
        return Prepared(train, read_prompts(run.heldout()), sizes)
    proof.tokens(config.data.train, config.data.split, config, facts.chat)
    loaded = load_both(config, facts.chat, terminal.say, terminal.status)
    sizes = write_prompts(run, loaded.train, config.sampler.block_prompts)
    write_table(run.heldout(), to_table(loaded.heldout, PROMPT_SCHEMA))
    run.storage.publish(run.prepared())
    run.mark("prepared", block_sizes=sizes, train=loaded.train_counts, heldout=loaded.heldout_counts)
    return Prepared(loaded.train, loaded.heldout, sizes)
