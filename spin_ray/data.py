"""SFT data: read any of the common formats, tokenise once, cut into blocks.

A row becomes one `Prompt` per chosen assistant turn. Nothing disappears silently: every row is kept, refused with its
place in the file, or counted under the name of the rule that dropped it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spin_ray.chat import ChatFormat, Message
from spin_ray.config import DataConfig
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.records import Prompt

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


KEYS_THAT_DROP = {
    "dropped_long_prompt": "data.max_prompt_tokens", "dropped_long_answer": "data.max_answer_tokens", "dropped_bad": "data.bad_rows",
}
MANY = 0.1
"""More dropped rows than this share of all get a warning."""


def load_prompts(source: str, config: DataConfig, chat: ChatFormat, *, seed: int, limit: int = 0) -> tuple[list[Prompt], dict[str, int]]:
    """Read and tokenise `source`; returns prompts in seeded order and the count of rows under every rule.

    `prompt_id` is the position in the returned list. `limit` > 0 keeps the first that many.
    Raises BadInput naming file and line for the first row a rule refuses, or if nothing is left.
    """
    prompts, counts, seen = [], Counter(rows=0, kept=0), set()
    for where, row in read_rows(source, config.split):
        counts["rows"] += 1
        try:
            dialogues = list(_turns(to_messages(row), config.turns))
            encoded = [chat.encode(prompt, answer) for prompt, answer in dialogues]
            answer = _checkable(row)
        except ValueError as error:
            if config.bad_rows == "refuse":
                raise BadInput(f"{where}: {_printable(error)}; data.bad_rows=drop counts and drops such rows") from error
            counts["dropped_bad"] += 1
            continue
        for prompt_ids, real_ids in encoded:
            rule = _too_long(prompt_ids, real_ids, config)
            if rule and config.long_rows == "refuse":
                raise BadInput(f"{where}: {rule}; data.long_rows=drop counts and drops such rows")
            if rule:
                counts["dropped_long_prompt" if rule.startswith("prompt") else "dropped_long_answer"] += 1
                continue
            key = (tuple(prompt_ids), tuple(real_ids))
            counts["duplicates"] += key in seen
            if key in seen and config.duplicate_rows == "drop":
                continue
            seen.add(key)
            prompts.append((np.array(prompt_ids, np.int32), np.array(real_ids, np.int32), answer))
    if not prompts:
        raise BadInput(f"{counted(source, counts)}; no usable row is left")
    order = np.random.default_rng(seed).permutation(len(prompts))[: limit or None]
    counts["kept"] = len(order)
    chosen = [Prompt(k, *prompts[i]) for k, i in enumerate(order)]
    return chosen, dict(counts)


def _printable(error: Exception) -> str:
    """What an error quotes from a row, on one line and without what a terminal would act on."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


def _checkable(row: dict[str, Any]) -> str | None:
    """The row's `answer` as text; ValueError if that is no valid Unicode."""
    if row.get("answer") is None:
        return None
    return str(row["answer"]).encode().decode()


def counted(source: str, counts: Mapping[str, int]) -> str:
    """One line for the user: what became of a source's rows."""
    line = f"{source}: " + ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items())
    dropped = sum(number for name, number in counts.items() if name.startswith("dropped"))
    if dropped > MANY * counts.get("rows", 0):
        line += f"; warning: {dropped} rows dropped, see {', '.join(KEYS_THAT_DROP[name] for name in counts if name in KEYS_THAT_DROP)}"
    return line


def _too_long(prompt_ids: list[int], real_ids: list[int], config: DataConfig) -> str | None:
    if len(prompt_ids) > config.max_prompt_tokens:
        return f"prompt of {len(prompt_ids)} tokens > data.max_prompt_tokens={config.max_prompt_tokens}"
    if len(real_ids) > config.max_answer_tokens:
        return f"answer of {len(real_ids)} tokens > data.max_answer_tokens={config.max_answer_tokens}"
    return None


def read_rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of a file, a folder saved by `datasets`, a hub data set, or demo:NAME."""
    source = resolve(source)
    path = Path(source).expanduser()
    looks_like_file = path.suffix in (".jsonl", ".json", ".parquet")
    if path.is_dir():
        yield from _from_datasets(source, split, saved=True)
    elif not path.exists() and (looks_like_file or source.startswith((".", "/", "~"))):
        raise BadInput(f"{source}: no such file")
    elif not path.exists():
        yield from _from_datasets(source, split, saved=False)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise BadInput(f"{source}: unknown kind of data file; use .jsonl, .json, .parquet or a folder saved by datasets")


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path} line {number}", _object(line, f"{path} line {number}")


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _parse(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise BadInput(f"{path}: a .json data file must hold one list of rows; for one row per line use .jsonl")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadInput(f"{path} row {number}: expected an object, found {type(row).__name__}")
        yield f"{path} row {number}", row


def _object(line: bytes, where: str) -> dict[str, Any]:
    row = _parse(line, where)
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of the first kind: JSON's errors, Unicode's, a number of 5,000 digits
        raise BadInput(f"{where}: not valid JSON: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: values that Python has no type for
        raise BadInput(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _from_datasets(source: str, split: str, *, saved: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises a dozen unrelated types for "cannot be had"
        raise BadInput(f"{source}: cannot be loaded as a data set: {' '.join(str(error).split())}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise BadInput(f"{source}: no split {split}; it has {', '.join(loaded)} (data.split)")
        loaded = loaded[split]
    for number, row in enumerate(loaded):
        yield f"{source} row {number}", row


def to_messages(row: dict[str, Any]) -> list[Message]:
    """A row of any known format as a list of role/content messages.

    Knows messages, SPIN's real/generated, prompt/response|completion, ShareGPT and Alpaca. Raises ValueError for others.
    """
    if row.get("messages") is not None:
        return _messages(row["messages"], "messages")
    if row.get("real") is not None:
        return _messages(row["real"], "real")
    if row.get("conversations") is not None:
        return _sharegpt(row["conversations"])
    if row.get("prompt") is not None:
        answer = row.get("response") if row.get("response") is not None else row.get("completion")
        return _as_turns(row["prompt"], "user", "prompt") + _as_turns(answer, "assistant", "response or completion")
    if row.get("instruction") is not None:
        asked, given = row["instruction"], row.get("input")
        if not isinstance(asked, str) or not (given is None or isinstance(given, str)):
            raise ValueError("instruction and input must be text")
        question = f"{asked}\n\n{given}" if given else asked
        return [{"role": "user", "content": question}, *_as_turns(row.get("output"), "assistant", "output")]
    known = "messages, real, conversations, prompt + response, instruction + output"
    raise ValueError(f"none of the known columns ({known}); this row has {', '.join(map(str, row)) or 'none'}")


def _as_turns(value: Any, role: str, column: str) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, column)
    if not isinstance(value, str):
        raise ValueError(f"no {column}" if value is None else f"{column} must be text, found {type(value).__name__}")
    return [{"role": role, "content": value}]


def _messages(turns: Any, column: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{column} must be a list of messages that is not empty")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise ValueError(f"every message in {column} needs a role and a content, both text")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _sharegpt(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations must be a list of {from, value}")
    unknown = [turn.get("from") for turn in turns if not isinstance(turn.get("from"), str) or turn["from"] not in _SHAREGPT_ROLES]
    if unknown:
        raise ValueError(f"conversations: unknown speaker {unknown[0]!r}")
    return _messages([{"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")} for turn in turns], "conversations")


def _turns(messages: list[Message], which: str) -> Iterator[tuple[list[Message], str]]:
    """The chosen assistant turns as (everything before, answer). Raises ValueError if there is none or one is empty."""
    places = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not places or places[0] == 0:
        raise ValueError("no assistant answer" if not places else "the dialogue begins with the assistant")
    chosen = {"last": places[-1:], "first": places[:1], "all": places}[which]
    for place in chosen:
        if not messages[place]["content"].strip():
            raise ValueError("empty answer")
        yield messages[:place], messages[place]["content"]
