"""How long the rows are that a run will train on: read and tokenised, or given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spin_ray.chat import ChatFormat
from spin_ray.config import Config, DataConfig
from spin_ray.data.encoding import Encoded, Encoder, encoded
from spin_ray.data.files import read_rows
from spin_ray.errors import BadInput
from spin_ray.lengths import Lengths
from spin_ray.look.plan.activations import Row

READ = 4000
"""Rows that are tokenised; the others are only counted."""


@dataclass(frozen=True)
class Texts:
    """Prompts with their real answers, in tokens."""

    num_prompts: int
    num_eval: int
    prompt: float
    """Mean."""
    answer: float
    """Mean."""
    longest_pair: int
    """Tokens of the longest prompt with two answers in a row."""
    spread: float
    """Standard deviation of a pair's tokens in a row."""
    source: str
    """In words: where the numbers are from."""
    longest: Lengths
    """What decides whether the model has enough positions."""

    def generated(self, max_new_tokens: int) -> float:
        """Mean tokens of the opponent's answers: like the real ones, as nobody has drawn any yet."""
        return min(self.answer, max_new_tokens)

    def pair(self, max_new_tokens: int, *, alone: bool = False) -> float:
        """Mean tokens of a pair in a packed row: the prompt once, the last token of an answer not. `alone`: with the real answer only."""
        return self.prompt + self.answer - 1 + (0 if alone else self.generated(max_new_tokens) - 1)

    def row(self, tokens: float, *, max_new_tokens: int, share_prompt: bool, alone: bool) -> Row:
        """A packed row of so many tokens."""
        answers = (self.answer - 1,) if alone else (self.answer - 1, self.generated(max_new_tokens) - 1)
        if share_prompt or alone:
            return Row(tokens / (self.prompt + sum(answers)), self.prompt, answers)
        return Row(tokens / (self.prompt + max(answers)), self.prompt, (max(answers),))

    def largest_batch(self, pairs: int, max_new_tokens: int, *, alone: bool) -> float:
        """Tokens of the largest of many batches."""
        return pairs * self.pair(max_new_tokens, alone=alone) + 2.5 * math.sqrt(pairs) * self.spread


def given(prompt: int, answer: int, num_prompts: int, config: Config) -> Texts:
    longest = prompt + answer * (1 if config.method == "sft" else 2)
    source = f"given: {num_prompts:,} prompts of {prompt} tokens, answers of {answer}; all are taken to be alike"
    return Texts(
        num_prompts, config.data.max_eval_prompts if config.data.eval else 0, prompt, answer, longest, 0.0, source,
        Lengths(num_prompts, prompt, prompt + answer, answer * num_prompts),
    )


def read(config: Config, chat: ChatFormat) -> Texts:
    """Tokenise the first rows of the training data, and count all. Raises BadInput as a run would, and if nothing is left."""
    data = config.data
    lengths, rows, kept = _lengths(config, chat, data.train, data.split)
    if not len(lengths):
        raise BadInput(f"{data.train}: none of the first {READ} rows is usable; a run would say why")
    usable = round(rows * kept)
    num_prompts = min(usable, data.max_prompts or usable)
    heldout = sum(1 for _ in read_rows(data.eval, data.eval_split or data.split)) if data.eval else 0
    other = {"spin": config.sampler.max_new_tokens, "sft": 0, "dpo": lengths[:, 1]}[config.method]  # tokens of the other answer, at most
    pairs = lengths.sum(1) + np.minimum(lengths[:, 1], other)
    how = "all rows" if rows <= READ else f"the first {READ:,} of {rows:,} rows"
    return Texts(
        num_prompts, min(heldout, data.max_eval_prompts or heldout), *(float(mean) for mean in lengths.mean(0)),
        int((lengths.sum(1) + other).max()), float(pairs.std()),
        f"measured: {how} of {data.train} tokenised; {num_prompts:,} prompts",
        Lengths(len(lengths), int(lengths[:, 0].max()), int(lengths.sum(1).max()), int(lengths[:, 1].sum())),
    )


def _lengths(config: Config, chat: ChatFormat, source: str, split: str) -> tuple[np.ndarray, int, float]:
    """[rows, 2] tokens of prompt and answer; how many rows there are; usable examples per row."""
    rows = read_rows(source, split)
    first = list(itertools.islice(rows, READ))
    found = list(_usable(config.data, iter(first), chat, preferences=config.method == "dpo"))
    return np.array(found).reshape(-1, 2), len(first) + sum(1 for _ in rows), len(found) / max(1, len(first))


def _usable(data: DataConfig, rows: Iterator, chat: ChatFormat, *, preferences: bool) -> Iterator[tuple[int, int]]:
    for _, batch, _ in encoded(Encoder(chat, data, preferences), rows, 1):
        for row in batch:
            for ids in row.ids if isinstance(row, Encoded) else ():
                if not isinstance(ids, ValueError) and len(ids[0]) <= data.max_prompt_tokens and len(ids[1]) <= data.max_answer_tokens:
                    yield len(ids[0]), len(ids[1])
