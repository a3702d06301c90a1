"""Every format of SFT data, every rule about rows, and one clear line for whatever is wrong."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from spin_ray.chat import ChatFormat
from spin_ray.config import Config, DataConfig
from spin_ray.data import counted, load_both, load_prompts, progress, to_messages
from spin_ray.demo import resolve
from spin_ray.errors import BadInput

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(AutoTokenizer.from_pretrained(resolve("demo:base")))


def load(path, chat, **options):
    limit = options.pop("limit", 0)
    return load_prompts(str(path), DataConfig(train=str(path), **options), chat, seed=0, limit=limit)


def jsonl(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(prompts, chat):
    return sorted((chat.decode(p.prompt_ids), chat.decode(p.real_ids)) for p in prompts)


@pytest.mark.parametrize("row", [
    {"messages": [USER, ASSISTANT]},
    {"real": [USER, ASSISTANT], "generated": [USER, {"role": "assistant", "content": "no"}]},
    {"prompt": "Hi", "response": "Hello"},
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
], ids=["messages", "spin", "response", "completion", "conversational", "alpaca", "sharegpt"])
def test_every_format_gives_the_same_messages(row):
    assert to_messages(row) == [USER, ASSISTANT]


def test_alpaca_input_follows_the_instruction():
    assert to_messages({"instruction": "Add", "input": "1 2", "output": "3"})[0]["content"] == "Add\n\n1 2"


def test_every_kind_of_file(tmp_path, chat):
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [{"role": "user", "content": "Bye"}, ASSISTANT]}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved_dict")
    expected = texts(load(jsonl(tmp_path, *rows), chat)[0], chat)
    assert len(expected) == 2
    for name in ("data.json", "data.parquet", "saved", "saved_dict"):
        assert texts(load(tmp_path / name, chat)[0], chat) == expected, name


@pytest.mark.parametrize("which, number", [("last", 1), ("first", 1), ("all", 2)])
def test_turns(tmp_path, chat, which, number):
    system = {"role": "system", "content": "Be kind"}
    row = {"messages": [system, USER, ASSISTANT, {"role": "user", "content": "More"}, {"role": "assistant", "content": "Again"}]}
    prompts, _ = load(jsonl(tmp_path, row), chat, turns=which)
    assert len(prompts) == number
    answers = {chat.decode(p.real_ids) for p in prompts}
    assert answers == {"last": {"Again"}, "first": {"Hello"}, "all": {"Hello", "Again"}}[which]
    assert all(chat.decode(p.prompt_ids).startswith("Be kind") for p in prompts)


@pytest.mark.parametrize("row, message", [
    ('{"messages": [', "line 2: not valid JSON"),
    ("[1, 2]", "line 2: expected an object, found list"),
    ({"text": "x"}, "line 2: none of the known columns"),
    ({"a\n\x1b[2J": "x"}, r"this row has a\n\x1b[2J"),
    ({"messages": []}, "line 2: messages must be a list"),
    ({"messages": [USER]}, "line 2: no assistant answer"),
    ({"messages": [ASSISTANT]}, "line 2: the dialogue begins with the assistant"),
    ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "line 2: empty answer"),
    ({"messages": [USER, {"role": "assistant"}]}, "needs a role and a content"),
    ({"prompt": "Hi"}, "line 2: no response or completion"),
    ({"prompt": "Hi", "response": 3}, "must be text, found int"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown speaker 'bot'"),
    ({"messages": [USER, {"role": "assistant", "content": "a<|end|>b"}]}, "contains the end-of-turn token"),
])
def test_bad_rows_are_refused_with_file_and_line(tmp_path, chat, row, message):
    path = jsonl(tmp_path, {"messages": [USER, ASSISTANT]}, row)
    with pytest.raises(BadInput) as caught:
        load(path, chat)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_rows_can_be_dropped_and_are_counted(tmp_path, chat):
    prompts, counts = load(jsonl(tmp_path, {"messages": [USER, ASSISTANT]}, {"prompt": "Hi"}, {"text": "x"}), chat, bad_rows="drop")
    assert len(prompts) == 1 and counts["dropped_bad"] == 2 and counts["rows"] == 3


def test_long_rows_are_counted_or_refused_never_cut(tmp_path, chat):
    long_prompt = {"messages": [{"role": "user", "content": "Hi " * 50}, ASSISTANT]}
    long_answer = {"messages": [USER, {"role": "assistant", "content": "Hello " * 50}]}
    path = jsonl(tmp_path, {"messages": [USER, ASSISTANT]}, long_prompt, long_answer)
    prompts, counts = load(path, chat, max_prompt_tokens=40, max_answer_tokens=40)
    assert (len(prompts), counts["dropped_long_prompt"], counts["dropped_long_answer"]) == (1, 1, 1)
    with pytest.raises(BadInput, match=r"line 2: prompt of .* tokens > data.max_prompt_tokens=40"):
        load(path, chat, max_prompt_tokens=40, long_rows="refuse")


def test_many_dropped_rows_name_the_key():
    assert "warning" not in counted("x", {"rows": 100, "kept": 95, "dropped_bad": 5})
    assert counted("x", {"rows": 100, "kept": 10, "dropped_long_prompt": 90}).endswith("; warning: 90 rows dropped, see data.max_prompt_tokens")


def test_duplicates_are_counted(tmp_path, chat):
    path = jsonl(tmp_path, *[{"messages": [USER, ASSISTANT]}] * 3)
    prompts, counts = load(path, chat)
    assert (len(prompts), counts["duplicates"]) == (1, 2)
    prompts, counts = load(path, chat, duplicate_rows="keep")
    assert (len(prompts), counts["duplicates"]) == (3, 2)


def test_order_is_seeded_and_limited(tmp_path, chat):
    path = jsonl(tmp_path, *[{"prompt": f"question {k}", "response": "Hello"} for k in range(20)])
    first, again = load(path, chat)[0], load(path, chat)[0]
    assert [p.prompt_ids.tolist() for p in first] == [p.prompt_ids.tolist() for p in again]
    assert [p.prompt_id for p in first] == list(range(20))
    assert [p.prompt_ids.tolist() for p in load(path, chat, limit=5)[0]] == [p.prompt_ids.tolist() for p in first[:5]]


@pytest.mark.parametrize("name, content, message", [
    ("none.jsonl", None, "no such file"),
    ("data.txt", b"x", "unknown kind of data file"),
    ("data.json", b'{"a": 1}', "must hold one list of rows"),
    ("data.parquet", b"not parquet", "not a readable Parquet file"),
    ("empty.jsonl", b"\n\n", "no usable row is left"),
])
def test_unreadable_files(tmp_path, chat, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        load(tmp_path / name, chat)


def test_half_surrogates_and_endless_numbers_are_refused_in_one_line(tmp_path, chat):
    rows = [
        '{"prompt": "Hi \\ud800", "response": "Hello"}', '{"prompt": "Hi", "response": "Hello", "answer": "\\udfff"}',
        '{"messages": [{"role": "\\ud800", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}',
    ]
    for row in rows:
        path = jsonl(tmp_path, row, {"prompt": "Hi", "response": "Hello"})
        with pytest.raises(BadInput, match=r"line 1: .*surrogates not allowed"):
            load(path, chat)
        assert load(path, chat, bad_rows="drop")[1]["dropped_bad"] == 1
    with pytest.raises(BadInput, match="line 1: not valid JSON: Exceeds the limit"):
        load(jsonl(tmp_path, '{"answer": ' + "1" * 5000 + "}"), chat)
    with pytest.raises(BadInput, match="line 1: not valid JSON: maximum recursion"):
        load(jsonl(tmp_path, "[" * 100_000), chat)


def test_a_line_of_megabytes_is_counted(tmp_path, chat):
    path = jsonl(tmp_path, {"messages": [USER, ASSISTANT]}, {"prompt": "Hi", "response": "x" * 2**20})
    assert load(path, chat)[1] == {"rows": 2, "kept": 1, "dropped_long_answer": 1, "duplicates": 0}


def test_a_row_that_looks_like_a_path_or_a_template_stays_what_it_is(tmp_path, chat):
    (tmp_path / "other.jsonl").write_text('{"prompt": "stolen", "response": "stolen"}')
    texts = [str(tmp_path / "other.jsonl"), "demo:train", "../../etc/passwd", "{{ 7*7 }}"]
    prompts, _ = load(jsonl(tmp_path, *[{"prompt": text, "response": text, "answer": text} for text in texts]), chat)
    expected = {(tuple(x), tuple(y)) for x, y in (chat.encode([{"role": "user", "content": text}], text) for text in texts)}
    assert {(tuple(p.prompt_ids), tuple(p.real_ids)) for p in prompts} == expected and {p.answer for p in prompts} == set(texts)


ODD_TEXT = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(["Hi", "", "<|end|>", "{{ 7*7 }}", "user", "assistant"])
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT | st.sampled_from(["role", "content", "from", "value"]), inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "system"]) | ODD, "content": ODD_TEXT | ODD, "from": st.sampled_from(["human", "gpt"]) | ODD, "value": ODD_TEXT | ODD,
})
COLUMN = st.lists(TURN, max_size=4) | ODD_TEXT | ODD
NAMES = ("messages", "real", "conversations", "prompt", "response", "completion", "instruction", "input", "output", "answer")
ROW = st.fixed_dictionaries({}, optional={name: COLUMN for name in NAMES}) | ODD


def loads_or_says_one_line(path, chat):
    """Either every row is accounted for, or there is one clear line; in both ways of treating bad rows."""
    for bad_rows in ("drop", "refuse"):
        try:
            prompts, counts = load(path, chat, bad_rows=bad_rows)
        except BadInput as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert len(prompts) == counts["kept"] > 0
            assert counts["rows"] == sum(counts.get(rule, 0) for rule in ("kept", "dropped_bad", "dropped_long_prompt", "dropped_long_answer", "duplicates"))


FUZZ = settings(deadline=2000, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.lists(st.binary(max_size=60) | ROW.map(lambda row: json.dumps(row).encode()), max_size=4).map(b"\n".join))
def test_fuzz_jsonl(tmp_path, chat, content):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(content)
    loads_or_says_one_line(path, chat)


@FUZZ
@given(st.binary(max_size=60) | (st.lists(ROW, max_size=4) | ROW).map(lambda rows: json.dumps(rows).encode()))
def test_fuzz_json(tmp_path, chat, content):
    path = tmp_path / "fuzz.json"
    path.write_bytes(content)
    loads_or_says_one_line(path, chat)


@FUZZ
@given(st.lists(ROW, min_size=1, max_size=4), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=3))
def test_fuzz_parquet(tmp_path, chat, rows, flips):
    """Whatever Arrow can write, then some of its bytes changed."""
    try:
        table = pa.Table.from_pylist([row if isinstance(row, dict) else {"row": row} for row in rows])
        written = pa.BufferOutputStream()
        pq.write_table(table, written)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):  # no such column exists
        return
    content = bytearray(written.getvalue().to_pybytes())
    for place, value in flips:
        content[place % len(content)] = value
    path = tmp_path / "fuzz.parquet"
    path.write_bytes(content)
    loads_or_says_one_line(path, chat)


@FUZZ
@given(st.binary(max_size=200))
def test_fuzz_bytes_called_parquet(tmp_path, chat, content):
    path = tmp_path / "fuzz.parquet"
    path.write_bytes(b"PAR1" + content + b"PAR1")
    loads_or_says_one_line(path, chat)


TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message.reasoning_content %}{{ '(' + message.reasoning_content + ')' }}{% endif %}"
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}{{ '[' + call.function.name + call.function.arguments | tojson + ']' }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tools_chat():
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:base"))
    tokenizer.chat_template = TOOLS_TEMPLATE
    return ChatFormat(tokenizer)


def text(chat, prompt):
    """A prompt and its answer with their special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:base"))
    return tokenizer.decode(prompt.prompt_ids), tokenizer.decode(prompt.real_ids)


CALL = {"type": "function", "function": {"name": "w", "arguments": {"c": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {}}}]


def test_tools_tool_calls_and_thoughts_reach_the_template(tmp_path, tools_chat):
    row = {"tools": TOOLS, "messages": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12 C"}, {"role": "assistant", "content": "It is 12 C.", "reasoning_content": "so"},
    ]}
    [prompt], counts = load(jsonl(tmp_path, row), tools_chat, turns="all")
    assert text(tools_chat, prompt) == (
        '<|system|>[{"type": "function", "function": {"name": "w", "parameters": {}}}]<|end|><|user|>Weather?<|end|>'
        '<|assistant|>[w{"c": "Oslo"}]<|end|><|tool|>12 C<|end|><|assistant|>', "(so)It is 12 C.<|end|>",
    )
    assert counts["turns_that_only_call_tools"] == 1 and counts["kept"] == 1


def test_a_turn_with_text_and_a_call_is_trained_on_with_both(tmp_path, tools_chat):
    row = {"messages": [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}]}
    [prompt], _ = load(jsonl(tmp_path, row), tools_chat)
    assert text(tools_chat, prompt) == ("<|user|>Hi<|end|><|assistant|>", 'Let me see.[w{"c": "Oslo"}]<|end|>')


@pytest.mark.parametrize("row, name", [
    ({"messages": [USER, {**ASSISTANT, "reasoning_content": "so"}]}, "reasoning_content"),
    ({"messages": [{**USER, "mood": "glad"}, ASSISTANT]}, "mood"),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "12 C"}, ASSISTANT]}, "tool_calls"),
    ({"messages": [USER, ASSISTANT], "tools": TOOLS}, "tools"),
])
def test_what_the_template_does_not_use_is_refused_by_its_name(tmp_path, chat, row, name):
    with pytest.raises(BadInput, match=f"line 1: .*{name}"):
        load(jsonl(tmp_path, row), chat)


def test_what_was_passed_over_is_in_the_count_line(tmp_path, chat):
    rows = [{"prompt": f"Hi {k}", "chosen": "good", "rejected": "bad", "source": "x", "mood": "glad"} for k in range(3)]
    path = jsonl(tmp_path, *rows, {"prompt": "Bye", "response": "Bye", "source": "y"})
    _, counts = load(path, chat, ignore_columns=["mood"])
    assert counted("my.jsonl", counts) == (
        "my.jsonl: rows 4, kept 4, answers from chosen 3, duplicates 0; ignored columns: mood 3, rejected 3, source 4"
    )


def test_rows_past_a_limit_are_counted(tmp_path, chat):
    path = jsonl(tmp_path, *({"prompt": f"Hi {k}", "response": "Hello"} for k in range(5)))
    prompts, counts = load(path, chat, limit=2)
    assert len(prompts) == 2 and counted("my.jsonl", counts) == "my.jsonl: rows 5, kept 2, duplicates 0, left out by limit 3"


BAD_TURN = {"messages": [USER, ASSISTANT, USER, {"role": "assistant", "content": " "}, USER, {"role": "assistant", "content": "a<|end|>b"}, USER, {"role": "assistant", "content": "Bye"}]}


def test_with_all_turns_a_bad_turn_goes_and_its_dialogue_stays(tmp_path, chat):
    path = jsonl(tmp_path, BAD_TURN, {"messages": [USER, {"role": "assistant", "content": ""}]})
    prompts, counts = load(path, chat, turns="all", bad_rows="drop")
    assert sorted(chat.decode(p.real_ids) for p in prompts) == ["Bye", "Hello"]
    assert counts == {"rows": 2, "kept": 2, "dropped_bad_turns": 2, "dropped_bad": 1, "duplicates": 0, "with tokens of the template in a text": 1}
    assert "warning: 3 rows or turns dropped, see data.bad_rows" in counted("x", counts)
    with pytest.raises(BadInput, match="line 1: empty answer"):
        load(path, chat, turns="all")


def test_the_first_bad_row_is_told_where_bad_rows_are_dropped(tmp_path, chat):
    said = []
    path = jsonl(tmp_path, {"prompt": "Hi", "response": "Hello"}, {"prompt": "Hi", "response": "Hello", "images": ["a"]}, {"text": "x"})
    load_prompts(str(path), DataConfig(train="x", bad_rows="drop"), chat, seed=0, say=said.append)
    [line] = said
    assert line.startswith(f"{path} line 2: column images holds pictures") and line.endswith("(the first of 2 dropped rows)")


def config(**options):
    return Config(data=DataConfig(**options))


def both(chat, said=None, **options):
    return load_both(config(**options), chat, (said if said is not None else []).append)


def test_held_out_rows_come_from_their_own_split(tmp_path, chat):
    rows = [{"prompt": f"Hi {k}", "response": "Hello"} for k in range(4)]
    DatasetDict(train=Dataset.from_list(rows[:3]), test=Dataset.from_list(rows[3:])).save_to_disk(tmp_path / "set")
    source = str(tmp_path / "set")
    loaded = both(chat, train=source, eval=source, eval_split="test")
    assert texts(loaded.heldout, chat) == [("Hi 3", "Hello")] and len(loaded.train) == 3 and loaded.heldout_counts["rows"] == 1
    assert len(load_prompts(source, DataConfig(train="x"), chat, seed=0, split="test")[0]) == 1
    for eval_split in ("", "train"):
        with pytest.raises(BadInput, match=r"the same rows as data.train .*data.split=train, data.eval_split=train") as caught:
            both(chat, train=source, eval=f"{source}/../set", eval_split=eval_split)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"data.eval_split=test: there is no data.eval"):
        both(chat, train=source, eval_split="test")


def test_the_same_file_for_both_is_refused_by_whatever_path(tmp_path, chat, monkeypatch):
    path = jsonl(tmp_path, {"prompt": "Hi", "response": "Hello"})
    (tmp_path / "link.jsonl").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for other in (str(path), "data.jsonl", "./data.jsonl", "link.jsonl"):
        with pytest.raises(BadInput, match=r"the same rows as data.train"):
            both(chat, train=str(path), eval=other, eval_split="test")


def test_held_out_rows_that_are_trained_on_are_counted_and_warned_of(tmp_path, chat):
    rows = [{"prompt": f"Hi {k}", "response": "Hello"} for k in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    heldout = jsonl(tmp_path, *rows[3:], {"prompt": "Hi 0", "response": "Bye"}, {"prompt": "Hi 1", "response": "Bye"})
    said = []
    loaded = both(chat, said, train=str(tmp_path / "train.jsonl"), eval=str(heldout))
    assert loaded.heldout_counts["also_trained_on"] == 1 and loaded.heldout_counts["prompt_also_trained_on"] == 2
    assert said[-1].startswith(f"warning: of 5 held-out rows of {heldout}, 1 are also training rows and 2 have a training row's prompt with another answer")
    said.clear()
    both(chat, said, train=str(tmp_path / "train.jsonl"), eval=str(heldout), max_prompts=1)  # counted is what is trained on
    assert sum("warning" in line for line in said) <= 1 and "are also training rows and 3" not in said[-1]
    both(chat, said := [], train="demo:train", eval="demo:heldout")
    assert len(said) == 2 and all(line.startswith("demo:") for line in said)


def test_a_long_reading_shows_how_far_it_is_and_a_short_one_nothing(tmp_path, chat, monkeypatch):
    path = jsonl(tmp_path, *[{"prompt": f"Hi {k}", "response": "Hello"} for k in range(1200)])
    monkeypatch.setattr(progress, "QUIET_S", 60.0)  # a busy machine may need more than two seconds
    shown = []
    load_prompts(str(path), DataConfig(train="x", max_prompt_tokens=40), chat, seed=0, show=shown.append)
    assert shown == []
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    shown.clear()
    load_prompts(str(path), DataConfig(train="x"), chat, seed=0, show=shown.append)
    total = f"{progress.about_how_many(str(path)):,}"
    assert shown == [f"reading {path}: {done} of about {total} rows" for done in ("500", "1,000", "1,200")] + [""]


def test_a_file_says_about_how_many_rows_it_has_and_a_reading_how_long_it_will_take(tmp_path):
    path = jsonl(tmp_path, *[{"prompt": f"Hi {k % 10}", "response": "Hello"} for k in range(1000)])
    assert progress.about_how_many(str(path)) == 1000
    pq.write_table(pa.table({"prompt": ["a"] * 77}), tmp_path / "x.parquet")
    assert progress.about_how_many(str(tmp_path / "x.parquet")) == 77
    (tmp_path / "empty.jsonl").touch()
    assert [progress.about_how_many(str(tmp_path / name)) for name in ("empty.jsonl", "none.jsonl", ".")] == [None] * 3
    said = [progress.time_left(*numbers) for numbers in ((50, 100, 60.0), (1, 100, 60.0), (1, 1000, 60.0), (0, 9, 60.0), (9, 9, 60.0))]
    assert said == [", about 60 s left", ", about 99 min left", ", about 16.6 h left", "", ""]


def test_the_order_is_that_of_one_permutation_whatever_the_file(tmp_path, chat):
    """Golden: numpy's permutation of 7 with seed 3, so that a run that was begun earlier goes on with the same prompts."""
    path = jsonl(tmp_path, *[{"prompt": f"q{k}", "response": "Hello"} for k in range(7)])
    prompts, _ = load_prompts(str(path), DataConfig(train="x"), chat, seed=3)
    assert [chat.decode(p.prompt_ids) for p in prompts] == [f"q{k}" for k in np.random.default_rng(3).permutation(7)]
    few, _ = load_prompts(str(path), DataConfig(train="x"), chat, seed=3, limit=2)
    assert [p.prompt_ids.tolist() for p in few] == [p.prompt_ids.tolist() for p in prompts[:2]]
    assert all(p.prompt_ids.dtype == np.int32 and p.real_ids.dtype == np.int32 for p in prompts)


def test_rows_around_the_border_of_a_batch_are_all_there(tmp_path, chat):
    for number in (499, 500, 501):
        path = jsonl(tmp_path, *[{"prompt": f"q{k}", "response": "Hello"} for k in range(number)])
        prompts, counts = load(path, chat)
        assert len(prompts) == counts["rows"] == number
    with pytest.raises(BadInput, match="line 501: empty answer"):
        load(jsonl(tmp_path, *[{"prompt": f"q{k}", "response": "Hello" if k < 500 else ""} for k in range(501)]), chat)
