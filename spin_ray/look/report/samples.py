"""What the versions of a run answered, token by token: each token with how much more likely a training has made it.

| answer | coloured by |
|---|---|
| the real one | log p under the newest version, less log p under theta_0 |
| theta_t's | log p under theta_{t+1}, less log p under theta_t: what the main player was taught to avoid is below 0 |

Held-out prompts where there are some, else the first ones that were trained on. Text is data: it goes into the page as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_ray.errors import BadInput, in_one_line
from spin_ray.heldout import OF_BEFORE
from spin_ray.look.report.story import Story
from spin_ray.records import Pair, from_table

MOST_SAMPLES = 200
MOST_TOKENS = 100_000
"""Of all samples of a page: about a hundred bytes each at most, in a page of five megabytes."""
LONGEST = 400
"""Tokens shown of one answer, or of a prompt's end."""

Decode = Callable[[Sequence[int]], str]
Column = tuple[list[Pair], Sequence[np.ndarray] | None]
"""A version's answers, and what the next version's log-probs of them are, if anybody asked; [] for one that was not asked for."""


@dataclass(frozen=True)
class Samples:
    """What goes into the page."""

    source: str
    """Where they are from, for the reader."""
    versions: list[str]
    rows: list[dict[str, Any]]
    """prompt: text; real: pieces; answers: pieces per version. A piece is [text] or [text, log-ratio in nats]."""


def samples_of(story: Story, decode: Decode, most: int = MOST_SAMPLES) -> Samples:
    """Of one run; no rows where nothing is kept any more. Raises BadInput for what cannot be read."""
    columns, source = (_heldout(story), "held-out prompts") if story.evaluations else (_trained_on(story), "prompts that were trained on")
    if not columns:
        return Samples(source, [], [])
    pieces, rows, tokens = Pieces(decode), [], 0
    for k in range(min(most, *(len(pairs) for pairs, _ in columns.values()))):
        row = _row(k, columns, pieces)
        tokens += sum(map(len, (row["real"], *row["answers"])))
        if rows and tokens > MOST_TOKENS:
            break
        rows.append(row)
    return Samples(source, [story.version_name(version) for version in columns], rows)


def _row(k: int, columns: dict[int, Column], pieces: Pieces) -> dict[str, Any]:
    first, last = columns[min(columns)][0][k], columns[max(columns)][0][k]
    real = _ratios(last.opponent_real_logps, first.opponent_real_logps) if len(columns) > 1 else None
    answers = []
    for pairs, later in columns.values():
        pair = pairs[k]
        answers.append(pieces(pair.generated_ids, _ratios(later[k] if later else None, pair.opponent_generated_logps)))
    return {"prompt": pieces.text(first.prompt_ids[-LONGEST:]), "real": pieces(first.real_ids, real), "answers": answers}


def _ratios(later: np.ndarray | None, earlier: np.ndarray) -> np.ndarray | None:
    return later - earlier if later is not None and len(later) == len(earlier) > 0 else None


def _heldout(story: Story) -> dict[int, Column]:
    """Version -> its answers to the held-out prompts."""
    found: dict[int, list[Pair]] = {}
    later: dict[int, list[np.ndarray]] = {}
    for version in story.evaluations:
        table = _read(story, story.run.heldout_answers(version))
        if table is not None:
            has = OF_BEFORE in table.column_names
            later[version - 1] = [np.array(row, np.float32) for row in table.column(OF_BEFORE).to_pylist()] if has else None
            found[version] = from_table(table.drop_columns([OF_BEFORE]) if has else table, Pair)
    return {version: (pairs, later.get(version)) for version, pairs in found.items()}


def _trained_on(story: Story) -> dict[int, Column]:
    """Version -> its answers to the prompts of the first block, which are the same in every iteration."""
    columns: dict[int, Column] = {}
    for t in range(story.num_iterations):
        table = _read(story, story.run.pairs(t, "block", 0))
        if table is not None:
            scored = _read(story, story.run.pairs(t + 1, "replay", 0))
            later = None if scored is None else [pair.opponent_generated_logps for pair in from_table(scored, Pair)]
            columns[t] = (from_table(table, Pair), later)
    return columns


def _read(story: Story, path: Path) -> Any:
    """A table, or None where there is no file. Raises BadInput for a damaged one."""
    path = story.run.storage.fetch(path)
    try:
        return pq.ParquetFile(path).read(use_threads=False) if path.exists() else None
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{story.run.storage.name(path)}: damaged ({in_one_line(error)})") from error


class Pieces:
    """Token ids as pieces of text, each with its log-ratio. What a token says depends on the one before it, seldom on more."""

    def __init__(self, decode: Decode):
        self._decode, self._known = decode, {}

    def text(self, ids: Sequence[int]) -> str:
        return self._decode([int(token) for token in ids])

    def __call__(self, ids: np.ndarray, ratios: np.ndarray | None) -> list[list[Any]]:
        """Tokens that are letters only together, parts of one character, are one piece; its log-ratio is their sum."""
        pieces: list[list[Any]] = []
        before, group, total = (), [], 0.0
        for k, token in enumerate(ids[:LONGEST].tolist()):
            group.append(token)
            total += float(ratios[k]) if ratios is not None else 0.0
            text = self._piece(before, tuple(group))
            if text.endswith("\N{REPLACEMENT CHARACTER}") and len(group) < 4:
                continue
            pieces.append(_piece_of(text, ratios, total))
            before, group, total = (group[-1],), [], 0.0
        if group:
            pieces.append(_piece_of(self._piece(before, tuple(group)), ratios, total))
        return [*pieces, [" …"]] if len(ids) > LONGEST else pieces

    def _piece(self, before: tuple[int, ...], group: tuple[int, ...]) -> str:
        key = (before, group)
        if key not in self._known:
            alone = self._decode(list(before)) if before else ""
            self._known[key] = self._decode([*before, *group])[len(alone) :]
        return self._known[key]


def _piece_of(text: str, ratios: np.ndarray | None, total: float) -> list[Any]:
    """JSON has no word for what is no number, so that has no colour."""
    return [text] if ratios is None or not math.isfinite(total) else [text, round(total, 2)]
