"""Sources of rows -> prompts as token ids, with every row accounted for.

A row becomes one `Prompt` per chosen assistant turn. Nothing disappears silently: every row is kept, refused with its place in the
file, or counted under the name of the rule that dropped it; every column that was passed over is counted by its name.

Memory: rows are read and tokenised a batch at a time, by several processes where there are many (encoding.py). Their ids wait on the
disk, and whoever wants the prompts reads them there, one by one; kept.py has the bytes that stay of a row.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spin_ray.chat import ChatFormat, Row
from spin_ray.config import Config, DataConfig
from spin_ray.data.choice import Chosen
from spin_ray.data.columns import count_ignored
from spin_ray.data.encoding import Encoded, Encoder, chosen_of, encoded, processes_for
from spin_ray.data.files import read_rows, same_rows
from spin_ray.data.kept import KeptRows, Prompts
from spin_ray.data.progress import Progress
from spin_ray.errors import BadInput
from spin_ray.records import Prompt

KEYS_THAT_DROP = {
    "dropped_long_prompt": "data.max_prompt_tokens", "dropped_long_answer": "data.max_answer_tokens",
    "dropped_bad": "data.bad_rows", "dropped_bad_turns": "data.bad_rows",
}
MANY = 0.1
"""More dropped rows than this share of all get a warning."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Loaded:
    """The prompts of a run, and what became of the rows."""

    train: Prompts
    heldout: Sequence[Prompt]
    """Empty without data.eval."""
    train_counts: dict[str, int]
    heldout_counts: dict[str, int]


def load_both(config: Config, chat: ChatFormat, say: Say, show: Say | None = None, scratch: Path | None = None) -> Loaded:
    """Training and held-out prompts; `say` gets a line on each, and a warning if rows of one are in the other. `scratch`: as below.

    Raises BadInput if data.train and data.eval are the same rows, and for whatever `load_prompts` refuses.
    """
    data, split = config.data, config.data.eval_split or config.data.split
    if data.eval and same_rows(data.train, data.split, data.eval, split):
        raise BadInput(
            f"data.eval={data.eval}: the same rows as data.train (data.split={data.split}, data.eval_split={split}); "
            "give other rows as held-out data, or data.eval= for none"
        )
    if data.eval_split and not data.eval:
        raise BadInput(f"data.eval_split={data.eval_split}: there is no data.eval whose split it could be; give data.eval too")
    train, counts = load_prompts(
        data.train, data, chat, seed=config.run.seed, limit=data.max_prompts, preferences=config.method == "dpo", say=say, show=show,
        scratch=scratch,
    )
    say(counted(data.train, counts))
    if not data.eval:
        return Loaded(train, [], counts, {})
    heldout, heldout_counts = load_prompts(
        data.eval, data, chat, seed=config.run.seed, limit=data.max_eval_prompts, split=split, say=say, show=show,
        scratch=scratch,
    )
    say(counted(data.eval, heldout_counts))
    heldout_counts |= _warn_of_overlap(train, heldout, data, say)
    return Loaded(train, heldout, counts, heldout_counts)


def load_prompts(
    source: str, config: DataConfig, chat: ChatFormat, *, seed: int, limit: int = 0, split: str = "", preferences: bool = False,
    say: Say | None = None, show: Say | None = None, scratch: Path | None = None, first: int = 0,
) -> tuple[Prompts, dict[str, int]]:
    """Read and tokenise `source`; returns prompts in seeded order and the count of rows under every rule.

    `prompt_id` is the position in what is returned. `limit` > 0 keeps the first that many. `split` is data.split if empty.
    With `preferences` rows must have a rejected answer too. `say` gets the first of the rows that were dropped as bad; `show` how far a
    long reading has got, each in place of the last. `scratch`: a folder with room for the token ids, until the prompts are read.
    `first` > 0: read so many rows and no more.
    Raises BadInput naming file and line for the first row a rule refuses, or if nothing is left.
    """
    rows, loading = itertools.islice(read_rows(source, split or config.split), first or None), _Loading(config, scratch)
    with Progress(source, show) as progress:
        for batch in encoded(Encoder(chat, config, preferences), rows, processes_for(chat, config.num_processes)):
            loading.add(*batch)
            progress.at(loading.counts["rows"])
    counts = loading.counts
    if say and loading.first_bad:
        say(f"{loading.first_bad} (the first of {counts['dropped_bad'] + counts['dropped_bad_turns']} dropped rows)")
    if not len(loading):
        raise BadInput(f"{counted(source, counts)}; no usable row is left" + (f": {loading.first_bad}" if loading.first_bad else ""))
    if limit and len(loading) > limit:
        counts["left_out_by_limit"] = len(loading) - limit
    prompts = loading.kept.prompts(np.random.default_rng(seed).permutation(len(loading))[: limit or None])
    counts["kept"] = len(prompts)
    return prompts, dict(counts) | dict(loading.notes)


def first_rows(source: str, config: DataConfig, split: str, count: int, *, preferences: bool = False) -> list[Row]:
    """The first dialogues of a source, as `ChatFormat.encode_many` takes them; rows that a rule refuses are passed over."""
    chosen = (chosen_of(row, config, preferences) for _, row in read_rows(source, split))
    requests = (request for one in chosen if isinstance(one, Chosen) for request in one.requests())
    return list(itertools.islice(requests, count))


def counted(source: str, counts: Mapping[str, int]) -> str:
    """One line for the user: what became of a source's rows, and which columns were passed over."""
    ignored = {name.removeprefix("ignored "): number for name, number in counts.items() if name.startswith("ignored ")}
    rules = {name.replace("_", " "): number for name, number in counts.items() if not name.startswith("ignored ")}
    line = f"{source}: " + ", ".join(f"{name} {number}" for name, number in rules.items())
    if ignored:
        line += "; ignored columns: " + ", ".join(f"{name} {number}" for name, number in ignored.items())
    dropped = sum(number for name, number in counts.items() if name.startswith("dropped"))
    if dropped > MANY * counts.get("rows", 0):
        turns = " or turns" if counts.get("dropped_bad_turns") else ""
        keys = dict.fromkeys(KEYS_THAT_DROP[name] for name in counts if name in KEYS_THAT_DROP)
        line += f"; warning: {dropped} rows{turns} dropped, see {', '.join(keys)}"
    return line


class _Loading:
    """The rows that have been read so far: what is kept of each, and how they are counted."""

    def __init__(self, config: DataConfig, scratch: Path | None) -> None:
        self._config = config
        self.counts: Counter[str] = Counter(rows=0, kept=0)
        self.notes: Counter[str] = Counter()
        """What the chat format has to say of the dialogues."""
        self.first_bad = ""
        self.kept = KeptRows(scratch)

    def __len__(self) -> int:
        return len(self.kept)

    def add(self, places: Sequence[str], rows: Sequence[Encoded | ValueError], notes: Counter[str]) -> None:
        """Take the next rows in. Raises BadInput for the first that a rule refuses."""
        self.notes.update(notes)
        for where, row in zip(places, rows, strict=True):
            self.counts["rows"] += 1
            if isinstance(row, ValueError):
                self._drop_bad(where, [row], "dropped_bad")
            else:
                self._take(where, row)

    def _take(self, where: str, row: Encoded) -> None:
        count_ignored(self.counts, row.ignored)
        bad = [ids for ids in row.ids if isinstance(ids, ValueError)]
        if bad:
            self._drop_bad(where, bad, "dropped_bad" if len(bad) == len(row.ids) else "dropped_bad_turns")
        if len(bad) == len(row.ids):
            return
        self.counts.update(row.skipped)  # adds
        if row.from_chosen:
            self.counts["answers_from_chosen"] += 1
        for ids in row.ids:
            if not isinstance(ids, ValueError):
                self._keep(where, row.answer, *ids)

    def _drop_bad(self, where: str, errors: Sequence[ValueError], rule: str) -> None:
        what = f"{where}: {_printable(errors[0])}"
        if self._config.bad_rows == "refuse":
            of_every_row = any(sign in what for sign in ("none of the known columns", "data.ignore_columns"))
            raise BadInput(what if of_every_row else f"{what}; data.bad_rows=drop counts and drops such rows") from errors[0]
        self.first_bad = self.first_bad or what
        self.counts[rule] += 1 if rule == "dropped_bad" else len(errors)

    def _keep(
        self, where: str, answer: str | None, prompt_ids: Sequence[int], real_ids: Sequence[int], rejected_ids: Sequence[int] = (),
    ) -> None:
        rule = _too_long(prompt_ids, max(real_ids, rejected_ids, key=len), self._config)
        if rule and self._config.long_rows == "refuse":
            raise BadInput(f"{where}: {rule}; data.long_rows=drop counts and drops such rows")
        if rule:
            self.counts["dropped_long_prompt" if rule.startswith("prompt") else "dropped_long_answer"] += 1
            return
        is_new = self.kept.is_new(prompt_ids, real_ids, rejected_ids)
        self.counts["duplicates"] += not is_new
        if is_new or self._config.duplicate_rows == "keep":
            self.kept.append(answer, prompt_ids, real_ids, rejected_ids)


def _printable(error: Exception) -> str:
    """What an error quotes from a row, on one line and without what a terminal would act on."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


def _too_long(prompt_ids: Sequence[int], real_ids: Sequence[int], config: DataConfig) -> str | None:
    if len(prompt_ids) > config.max_prompt_tokens:
        return f"prompt of {len(prompt_ids)} tokens > data.max_prompt_tokens={config.max_prompt_tokens}"
    if len(real_ids) > config.max_answer_tokens:
        return f"answer of {len(real_ids)} tokens > data.max_answer_tokens={config.max_answer_tokens}"
    return None


def _warn_of_overlap(train: Sequence[Prompt], heldout: Sequence[Prompt], data: DataConfig, say: Say) -> dict[str, int]:
    """How many held-out rows are trained on: prompt and answer, or the prompt with another answer."""
    trained: dict[bytes, set[bytes]] = {prompt.prompt_ids.tobytes(): set() for prompt in heldout}
    asked = set()
    for prompt in train:
        if (question := prompt.prompt_ids.tobytes()) in trained:
            trained[question].add(prompt.real_ids.tobytes())
            asked.add(question)
    same = sum(prompt.real_ids.tobytes() in trained[prompt.prompt_ids.tobytes()] for prompt in heldout)
    other = sum(prompt.prompt_ids.tobytes() in asked for prompt in heldout) - same
    if not same + other:
        return {}
    say(
        f"warning: of {len(heldout)} held-out rows of {data.eval}, {same} are also training rows and {other} have a training row's prompt "
        "with another answer; held-out metrics will look better than they are"
    )
    return {"also_trained_on": same, "prompt_also_trained_on": other}
