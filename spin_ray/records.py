"""The messages that cross process borders; every one is stamped with the opponent version it belongs to.

Version t is the model theta_t of the paper: version 0 is the SFT model, version t + 1 the main player after iteration t.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.storage import Disk

NO_TOKENS, NO_LOGPS = np.zeros(0, np.int32), np.zeros(0, np.float32)


@dataclass(frozen=True)
class Version:
    """Which weights: theta_number, or a snapshot of the main player on its way there (only `overlap.mode=lookahead` makes those)."""

    number: int
    steps_early: int = 0
    """Optimizer steps that the snapshot is short of theta_number; 0: theta_number itself."""

    def __str__(self) -> str:
        return f"theta_{self.number}" + (f" less {self.steps_early} steps" if self.steps_early else "")

    def precedes(self, other: Version) -> bool:
        """Whether the main player was at these weights before it was at `other`."""
        return (self.number, -self.steps_early) < (other.number, -other.steps_early)


@dataclass(frozen=True)
class Saved:
    """Where weights lie for good: a model's folder, or its name on the hub; of a base with an adapter, the adapter's folder too."""

    model: str
    adapter: str | None = None

    def fetched(self, storage: Disk) -> Saved:
        """The same on this node's disk."""
        return Saved(str(storage.fetch(Path(self.model))), self.adapter and str(storage.fetch(Path(self.adapter))))


Devices = tuple[tuple[str, int], ...]
"""GPUs, each as its node's id and its number there."""


@dataclass(frozen=True)
class Prompt:
    """One SFT record as token ids: the prompt x and the real answer y."""

    prompt_id: int
    """Position of the record in the prepared data, stable over all iterations."""
    prompt_ids: np.ndarray
    """[num_prompt_tokens] int32, chat template applied, up to and including the generation prompt."""
    real_ids: np.ndarray
    """[num_real_tokens] int32, ends with the end-of-turn token."""
    answer: str | None = None
    """What a correct response must say, where the data is checkable."""
    rejected_ids: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    """[num_rejected_tokens] int32, the worse answer of a preference row; empty in others."""


@dataclass(frozen=True)
class SamplingSettings:
    """How an answer is drawn."""

    temperature: float
    """0: greedy."""
    top_p: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end an answer, special tokens written out; the answer's tokens go on to the end of the text."""


@dataclass(frozen=True)
class Completion:
    """One answer drawn by the opponent."""

    version: Version
    """Whose weights drew and scored these tokens."""
    token_ids: np.ndarray
    """[num_tokens] int32; holds the end-of-turn token if and only if it was sampled."""
    logps: np.ndarray
    """[num_tokens] float32, log p of each drawn token at temperature 1, in nats."""
    finish_reason: str
    """"stop": ended by itself; "length": cut at the token limit."""


@dataclass(frozen=True)
class Likelihood:
    """What a version says of a given continuation of a text."""

    logp: float
    """Log-prob of the whole continuation, in nats: the sum over its tokens, in float64."""
    greedy: bool
    """Whether greedy decoding would write it: every token of it is the most likely one."""


@dataclass(frozen=True)
class Pair:
    """One training example: the real and the generated answer to a prompt, with the reference's log-probs.

    In preference rows (`method: dpo`) the real answer is the chosen one, the generated one the rejected. T-SPIN has a third answer.
    """

    prompt_id: int
    iteration: int
    """Iteration in which the main player trains on the pair."""
    opponent_version: int
    """Number of the version that wrote `generated_ids`."""
    scored_version: int
    """Number of the version whose log-probs are the reference of the loss."""
    prompt_ids: np.ndarray
    """[num_prompt_tokens] int32."""
    real_ids: np.ndarray
    """[num_real_tokens] int32."""
    generated_ids: np.ndarray
    """[num_generated_tokens] int32."""
    opponent_real_logps: np.ndarray
    """[num_real_tokens] float32, nats; empty where the learner computes the references (`reference.scorer`)."""
    opponent_generated_logps: np.ndarray
    """[num_generated_tokens] float32, nats; empty likewise."""
    finish_reason: str
    """How the generated answer ended: "stop" or "length"."""
    opponent_steps_early: int = 0
    """Optimizer steps that the writer was short of `opponent_version`; not 0 only with `overlap.mode=lookahead`."""
    scored_steps_early: int = 0
    """The same for `scored_version`."""
    anchor_ids: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    """[num_anchor_tokens] int32, what theta_0 answered, for losses that ask for it; empty for others, and where y' is that answer."""
    opponent_anchor_logps: np.ndarray = field(default_factory=lambda: NO_LOGPS)
    """[num_anchor_tokens] float32, nats; empty as those of the other answers."""

    @property
    def answers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Real, generated, anchor: an answer that is not there is empty."""
        return self.real_ids, self.generated_ids, self.anchor_ids

    @property
    def common_length(self) -> int:
        """Tokens that both answers have places for: the shorter one's. A pair without a generated answer has the real one's."""
        return min(len(self.real_ids), len(self.generated_ids)) or len(self.real_ids)


NUM_ANSWERS, NUM_PARTS = 3, 2
"""Of a pair: its answers; and of an answer its first `common_length` tokens and the rest. Log-probs of pairs are [N, 3, 2]."""


def opponent_reference(pair: Pair) -> np.ndarray:
    """The reference that came with a pair: log p of its answers in two parts, [3, 2] float64, in nats."""
    border = pair.common_length
    logps = pair.opponent_real_logps, pair.opponent_generated_logps, pair.opponent_anchor_logps
    return np.array([[part.sum(dtype=np.float64) for part in (answer[:border], answer[border:])] for answer in logps])


@dataclass(frozen=True)
class Span:
    """A stretch of time in which a player was busy."""

    player: str
    """"main player", or "opponent 0" for the first replica."""
    activity: str
    """opponent: play, audit, evaluate, load; main player: train, score, publish, save."""
    iteration: int
    """The opponent's: number of the version that it holds. The main player's: iteration whose pairs it trains on."""
    begin: float
    """Seconds since the epoch."""
    end: float


@dataclass(frozen=True)
class PublishedWeights:
    """One version of the weights, ready to be loaded by any number of samplers."""

    version: Version
    buckets: tuple[Any, ...]
    """Ray references to the WeightBuckets, in the order of the model's parameters; they live as long as the learner's worker."""
    num_bytes: int
    tied_names: Mapping[str, str] = field(default_factory=dict)
    """Second name -> first name of weights that the model knows twice."""
    adapter: Mapping[str, Any] | None = None
    """The buckets hold an adapter alone, and this is its adapter_config.json."""
    saved_at: Saved | None = None
    """Where the same weights lie, to be read instead of the buckets once they are there."""
    sender: Any | None = None
    """Actor that brings the buckets to each sampler that asks it (`weights.transport`); None: samplers fetch them."""


def real_only(prompt: Prompt, version: int) -> Pair:
    """A prompt as a pair without a generated answer and with zeros for references: for SFT, and for scoring real answers."""
    zeros = np.zeros(len(prompt.real_ids), np.float32)
    return Pair(
        prompt.prompt_id, version, version, version, prompt.prompt_ids, prompt.real_ids, NO_TOKENS, zeros, NO_LOGPS, "stop"
    )


_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
PAIR_SCHEMA = pa.schema({
    "prompt_id": pa.int64(), "iteration": pa.int32(), "opponent_version": pa.int32(), "scored_version": pa.int32(),
    "prompt_ids": _INTS, "real_ids": _INTS, "generated_ids": _INTS,
    "opponent_real_logps": _FLOATS, "opponent_generated_logps": _FLOATS, "finish_reason": pa.string(),
    "opponent_steps_early": pa.int32(), "scored_steps_early": pa.int32(), "anchor_ids": _INTS, "opponent_anchor_logps": _FLOATS,
})
PROMPT_SCHEMA = pa.schema({
    "prompt_id": pa.int64(), "prompt_ids": _INTS, "real_ids": _INTS, "answer": pa.string(), "rejected_ids": _INTS,
})


def to_table(records: Sequence[Pair] | Sequence[Prompt], schema: pa.Schema) -> pa.Table:
    """Lay records of one type out as an Arrow table, one row each."""
    return pa.table({name: _column([getattr(r, name) for r in records], schema.field(name).type) for name in schema.names})


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not (pa.types.is_list(kind) and values):
        return pa.array(values, type=kind)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)  # one copy of the numbers, instead of one Python object each
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(values), type=kind.value_type))


def digest(table: pa.Table, names: Sequence[str]) -> bytes:
    """SHA-256 of what columns hold, ids and lists of ids: the same wherever, and with whatever version of a library, they were written."""
    found = hashlib.sha256()
    for name in names:
        column = table.column(name).combine_chunks()
        if pa.types.is_list(column.type):
            found.update(np.asarray(pc.list_value_length(column), np.int32).tobytes())
            column = column.flatten()
        found.update(np.asarray(column).astype("<i8" if name == "prompt_id" else "<i4").tobytes())
    return found.digest()


def from_table(table: pa.Table, record: type) -> list[Any]:
    """The inverse of `to_table`; the arrays are views of the table's memory."""
    columns = [_values(table.column(name).combine_chunks()) for name in table.column_names]
    return [record(**dict(zip(table.column_names, row, strict=True))) for row in zip(*columns, strict=True)]


def _values(column: pa.Array) -> list[Any]:
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    numbers, ends = np.from_dlpack(column.values), column.offsets.to_pylist()  # `to_numpy` would import pandas
    return [numbers[begin:end] for begin, end in itertools.pairwise(ends)]
