"""Rows that several processes tokenise are the rows of one: order, counts, and the first error with its place."""

import dataclasses
import json
import os
import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from spin_ray.chat import ChatFormat
from spin_ray.config import DataConfig, changes_result
from spin_ray.data import encoding, load_prompts
from spin_ray.data.encoding import Encoder, encoded, processes_for
from spin_ray.demo import resolve
from spin_ray.errors import BadInput, RunStopped


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(AutoTokenizer.from_pretrained(resolve("demo:base")))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_ROWS", 20)
    monkeypatch.setattr(encoding, "SERIAL_BATCHES", 2)


ODD = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|end|>"}]}, {"text": "x"}, {"prompt": "Hi", "response": ""},
    {"prompt": "q 1", "response": "Hello 1"}, {"prompt": "Hi <|user|>", "response": "Hello", "source": "s"}, {"prompt": "w " * 90, "response": "long"},
    {"messages": [{"role": "tool", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
]


def load(tmp_path, chat, rows, **options):
    """With one process and with two: what came of it, or the error."""
    path, found = tmp_path / "rows.jsonl", []
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    for number in (1, 2):
        said = []
        try:
            config = DataConfig(train="x", num_processes=number, **options)
            prompts, counts = load_prompts(str(path), config, chat, seed=1, say=said.append)
            found.append(([(p.prompt_ids.tolist(), p.real_ids.tolist(), p.answer) for p in prompts], list(counts.items()), said))
        except BadInput as error:
            found.append(str(error))
    return found


def test_two_processes_find_what_one_finds(tmp_path, chat):
    rows = [{"prompt": f"q {k}", "response": f"Hello {k % 50}", "answer": k} for k in range(130)] + ODD * 3 + ["", ""]
    random.Random(0).shuffle(rows)
    one, two = load(tmp_path, chat, rows, bad_rows="drop", max_prompt_tokens=60)
    assert one == two
    assert dict(one[1])["rows"] == 130 + 3 * len(ODD) and dict(one[1])["dropped_bad"] >= 9 and dict(one[1])["duplicates"] > 0
    assert len(one[2]) == 1 and "the first of" in one[2][0]


@pytest.mark.parametrize(("bad", "says"), [
    ({97: {"prompt": "Hi", "response": ""}}, "line 98: empty answer"),
    ({97: {"prompt": "Hi", "response": ""}, 121: "{no json"}, "line 98: empty answer"),  # what is refused comes before what cannot be read
    ({99: {"prompt": "Hi", "response": ""}, 98: "{no json"}, "line 99: not valid JSON"),
    ({45: "{no json", 97: {"text": "x"}}, "line 46: not valid JSON"),
])
def test_the_first_error_is_that_of_one_process(tmp_path, chat, bad, says):
    rows = [bad.get(k, {"prompt": f"q {k}", "response": "Hello"}) for k in range(140)]
    one, two = load(tmp_path, chat, rows)
    assert one == two and says in one


def die(rows):
    os._exit(1)


def test_a_process_that_dies_is_one_line(chat, monkeypatch):
    encoder = Encoder(chat, DataConfig(train="x"), False)
    rows = ((f"row {k}", {"prompt": f"q {k}", "response": "Hello"}) for k in range(400))
    monkeypatch.setattr(encoding, "_encode", die)
    with pytest.raises(RunStopped, match=r"a process that tokenises rows was ended.* data\.num_processes=1"):
        list(encoded(encoder, rows, 2))


def test_few_batches_are_under_way(chat):
    read = []
    rows = ((read.append(k) or f"row {k}", {"prompt": f"q {k}", "response": "Hello"}) for k in range(2000))
    batches = encoded(Encoder(chat, DataConfig(train="x"), False), rows, 2)
    assert [len(next(batches)[0]) for _ in range(2)] == [20, 20] and len(read) == 40
    next(batches)
    assert len(read) == 40 + 3 * 2 * 20
    batches.close()


def test_a_tokenizer_of_the_model_s_own_code_stays_here(chat):
    assert processes_for(chat, 3) == 3 and 1 <= processes_for(chat, 0) <= 8 and not changes_result("data.num_processes")
    own = type("Own", (), {"__module__": "transformers_modules.folder.tokenizer"})()
    copy = object.__new__(ChatFormat)
    copy.tokenizer = own
    assert processes_for(copy, 3) == 1


def test_what_is_sent_says_all_of_a_row(chat):
    encoder = Encoder(chat, DataConfig(train="x"), True)
    rows = [("a", {"prompt": "Hi", "chosen": "Ahoy", "rejected": "No"}), ("b", {"prompt": "Hi", "chosen": "Ahoy", "rejected": "Ahoy"})]
    [good, bad], _ = encoder.encode(rows)
    assert [chat.decode(np.array(ids)) for ids in good.ids[0][1:]] == ["Ahoy", "No"] and not good.from_chosen
    assert type(bad) is ValueError and "the same answer" in str(bad)
    plain = dataclasses.replace(encoder, preferences=False).encode(rows[:1])[0][0]
    assert plain.from_chosen and len(plain.ids[0]) == 2
