"""Whatever file the same rows are in, the same rows come out, as text stays text, with file and place."""

import bz2
import csv
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Json, List
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spin_ray.data.files import read_rows, same_rows
from spin_ray.data.rows import read_dialogue
from spin_ray.errors import BadInput

ROWS = [{"prompt": f"Hi {k}", "response": "Hello\n\"you\", é"} for k in range(3)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, **options):
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zst(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst, ".GZ": gzip.compress}
TEXTS = {
    ".jsonl": lines, ".ndjson": lines, ".json": lines, ".JSONL": lines, "_list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "_bom.json": lambda rows: b"\xef\xbb\xbf" + lines(rows), "_bom.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    ".csv": table, ".CSV": table, "_bom.csv": lambda rows: b"\xef\xbb\xbf" + table(rows), ".tsv": lambda rows: table(rows, delimiter="\t"),
    "_unix.csv": lambda rows: table(rows, lineterminator="\n", quoting=csv.QUOTE_ALL),
}


def read(path, split="train"):
    return list(read_rows(str(path), split))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("ending", TEXTS)
def test_text_files(tmp_path, ending, packed):
    path = tmp_path / f"data{ending}{packed}"
    path.write_bytes(PACKED[packed](TEXTS[ending](ROWS)))
    read_back = read(path)
    assert [row for _, row in read_back] == ROWS
    assert all(where.startswith(f"{path} ") for where, _ in read_back)


def write_arrow_stream(rows, path):
    with pa.ipc.new_stream(str(path), (made := pa.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(made, max_chunksize=2)


def write_arrow_file(rows, path):
    with pa.ipc.new_file(str(path), (made := pa.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(made, max_chunksize=2)


ARROWS = {
    ".parquet": lambda rows, path: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2),
    ".datasets.parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(str(path)),
    ".arrow": write_arrow_stream, ".file.arrow": write_arrow_file,
    "_saved": lambda rows, path: Dataset.from_list(rows).save_to_disk(path, num_shards=2),
    "_saved_dict": lambda rows, path: DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])).save_to_disk(path),
}


@pytest.mark.parametrize("kind", ARROWS)
def test_arrow_files(tmp_path, kind):
    path = tmp_path / f"data{kind}"
    ARROWS[kind](ROWS, path)
    assert read(path) == [(f"{path} row {k}", row) for k, row in enumerate(ROWS)]


def test_the_places_are_those_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines(ROWS[:1]) + b"\n\n" + lines(ROWS[1:]))
    assert [where.rsplit(" ", 1)[1] for where, _ in read(tmp_path / "a.jsonl")] == ["2", "5", "6"]
    (tmp_path / "a.jsonl").rename(tmp_path / "lines.json")
    assert [where.rsplit(" ", 1)[1] for where, _ in read(tmp_path / "lines.json")] == ["2", "5", "6"]
    (tmp_path / "a.csv").write_bytes(table(ROWS))  # every answer has a line break in it
    assert [where.rsplit(" ", 1)[1] for where, _ in read(tmp_path / "a.csv")] == ["2", "4", "6"]
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert [where.rsplit(" ", 1)[1] for where, _ in read(tmp_path / "a.json")] == ["0", "1", "2"]


ANSWERS = ["007", "NA", "null", "None", "nan", "1e5", "True", "1.0", "-", " x ", "0", "'", "=1+1", "N/A", "2020-01-01"]


@pytest.mark.parametrize("delimiter, ending", [(",", ".csv"), ("\t", ".tsv")])
def test_every_cell_of_a_table_stays_text(tmp_path, delimiter, ending):
    rows = [{"prompt": text, "response": text} for text in ANSWERS]
    (tmp_path / f"data{ending}").write_bytes(table(rows, delimiter=delimiter))
    assert [row for _, row in read(tmp_path / f"data{ending}")] == rows


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"prompt,response\nHi,Hello\nHi\n", "a.csv line 3: 1 cells under 2 columns (prompt, response)"),
    ("a.csv", b"prompt,response\nHi,Hello,you\n", "a.csv line 2: 3 cells under 2 columns"),
    ("a.csv", b"prompt,prompt\nHi,Hello\n", "a.csv line 1: two columns have the same name"),
    ("a.csv", b'prompt,response\nHi,"Hello\n', "a.csv line 2: unexpected end of data"),
    ("a.csv", b'prompt,response\nHi,"Hello"you\n', "a.csv line 2: ',' expected after '\"'"),
    ("a.csv", "prompt,response\nHi,Grüße\n".encode("latin-1"), "a.csv: not UTF-8 (invalid start byte"),
    ("a.jsonl", b'{"prompt": "Hi", "response": "Hello"}\nHello\n', "a.jsonl line 2: not valid JSON"),
    ("a.json", b'{"prompt": "Hi", "response": "Hello"}\n[]\n', "a.json line 2: expected an object, found list"),
    ("a.json", b'{\n"data": []\n}', "a.json: a .json data file must hold one list of rows, or one row per line"),
    ("a.json", b'{"data": [{"prompt": "Hi", "response": "Hello"}]}', "must hold one list of rows, or one row per line"),
    ("a.json", b"3", "must hold one list of rows, or one row per line"),
    ("a.json", b'[{"prompt": "Hi"} {"prompt": "Hi"}]', "a.json: not valid JSON: Expecting ','"),
    ("a.json", b'[{"prompt": "Hi"}', "a.json: not valid JSON"),
    ("a.json", b'[{"prompt": "Hi"},]', "a.json: not valid JSON"),
    ("a.json", b'[{"prompt": "Hi"}] x', "a.json: not valid JSON"),
    ("a.json", b"", "a.json: not valid JSON"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS) * 99)[:-40], "a.jsonl.gz: not a readable .jsonl file: Compressed file ended"),
    ("a.jsonl.gz", b"not packed", "a.jsonl.gz: not a readable .jsonl file: Not a gzipped file"),
    ("a.jsonl.bz2", b"not packed", "a.jsonl.bz2: not a readable .jsonl file"),
    ("a.jsonl.xz", b"not packed", "a.jsonl.xz: not a readable .jsonl file"),
    ("a.jsonl.zst", b"not packed", "a.jsonl.zst: not a readable .jsonl file"),
    ("a.jsonl.zst", zst(lines(ROWS) * 99)[:-9], "a.jsonl.zst: not a readable .jsonl file"),
    ("a.arrow", b"not Arrow", "a.arrow: not a readable Arrow file"),
    ("a.parquet.gz", b"", "a.parquet.gz: unknown kind of data file; what is read: .jsonl, .ndjson"),
    ("a.txt", b"Hi", "a.txt: unknown kind of data file; what is read: .jsonl, .ndjson"),
    ("a.zip", b"Hi", "a.zip: unknown kind of data file"),
    ("a.csv", b"prompt;response\na;b\n", "a.csv line 1: one column named 'prompt;response'; cells of such a file are separated by commas"),
    ("a.tsv", b"prompt,response\na,b\n", "a.tsv line 1: one column named 'prompt,response'; cells of such a file are separated by tabs"),
    ("a.json", b'{"data": [{"prompt": "a"}]}', "a.json: a .json data file must hold one list of rows, or one row per line; this one is an object, with a list under data"),
    ("a.jsonl", b'{"prompt": "a", "response": "b\n', "a.jsonl line 1: not valid JSON: Invalid control character at character 31"),
    ("a.jsonl", '{"prompt": "ü"}\n'.encode("latin-1"), "a.jsonl line 1: not UTF-8 (invalid start byte at byte 12); convert it"),
    ("a.jsonl", b'{"prompt": "a", "prompt": "b", "response": "c"}\n', "a.jsonl line 1: not valid JSON: an object has the key prompt twice"),
    ("a.json", b'[{"prompt": "a", "response": "b", "response": "c"}]', "a.json: not valid JSON: an object has the key response twice"),
])
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["Hi"]), pa.array(["Bye"])], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="two columns have the same name; there are prompt, prompt"):
        read(tmp_path / "a.parquet")


def test_an_empty_list_and_an_empty_file_have_no_rows(tmp_path):
    for name, content in {"a.json": b" [ ] ", "a.jsonl": b"", "a.csv": b"", "b.csv": b"prompt,response\n"}.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == []


def put(folder, files):
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_bytes(rows if isinstance(rows, bytes) else table(rows) if name.endswith(".csv") else lines(rows))


@pytest.mark.parametrize("files, splits", [
    ({"data/train-00001-of-00002.parquet": ROWS[2:], "data/train-00000-of-00002.parquet": ROWS[:2]}, {"train": ROWS}),
    ({"train-00000-of-00001.parquet": ROWS[:2], "test-00000-of-00001.parquet": ROWS[2:]}, {"train": ROWS[:2], "test": ROWS[2:]}),
    ({"train.jsonl": ROWS[:1], "validation.csv": ROWS[1:2], "README.md": b"# hello"}, {"train": ROWS[:1], "validation": ROWS[1:2]}),
    ({"train/a.jsonl": ROWS[:1], "train/b.ndjson": ROWS[1:2], "test/c.jsonl": ROWS[2:]}, {"train": ROWS[:2], "test": ROWS[2:]}),
    ({"part-0.jsonl.gz": gzip.compress(lines(ROWS[:2])), "part-1.jsonl.zst": zst(lines(ROWS[2:])), ".cache/x.jsonl": b"x"}, {"train": ROWS}),
    ({"a.csv": ROWS[:1], "b.parquet": ROWS[1:2], "c.json": ROWS[2:]}, {"train": ROWS}),
    ({"a/0.parquet": ROWS[:2], "b/0.parquet": ROWS[2:], "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b/*\n"
      b"  - split: rest\n    path: a/*\n---\n"}, {"train": ROWS[2:], "rest": ROWS[:2]}),
], ids=["hub", "two splits", "by file", "by folder", "packed", "mixed", "as README says"])
def test_a_folder_of_files(tmp_path, files, splits):
    folder = tmp_path / "test_set"  # its own name says nothing about splits
    put(folder, files)
    for split, rows in splits.items():
        read_back = read(folder, split)
        assert [row for _, row in read_back] == rows
        assert all(os.path.isfile(where.rsplit(" ", 2)[0]) and where.startswith(str(folder)) for where, _ in read_back)
    with pytest.raises(BadInput, match=f"no split dev; it has {', '.join(splits)} "):
        read(folder, "dev")


@pytest.mark.parametrize("files, message", [
    ({"README.md": b"# hello"}, "no data files in this folder; what is read: .jsonl"),
    ({"a.jsonl": ROWS, "b.jsonl.zip": b"PK"}, "b.jsonl.zip is no kind of data file that is read"),
    ({"a.jsonl": ROWS, "b.jsonl.1": b"{}"}, "b.jsonl.1 is no kind of data file that is read"),
    ({"train-0.jsonl": ROWS, "more.jsonl": ROWS}, "more.jsonl belongs to none of the splits train by its name"),
    ({"main/train-0.parquet": ROWS, "socratic/train-0.parquet": ROWS, "README.md": b"---\nconfigs:\n- config_name: main\n  data_files: main/*\n"
      b"- config_name: socratic\n  data_files: socratic/*\n---\n"}, "Config name is missing"),
])
def test_folders_that_are_refused(tmp_path, files, message):
    put(tmp_path / "set", files)
    with pytest.raises(BadInput) as caught:
        read(tmp_path / "set")
    assert message in str(caught.value) and str(tmp_path / "set") in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_cached_and_a_file_that_has_changed_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = os.path.expanduser("~/.cache")
    before = set(os.listdir(os.environ.get("HF_HOME", home))) if os.path.isdir(home) else set()
    for name in ("set/train-0.parquet", "set/train-1.jsonl", "one.csv"):
        for rows in (ROWS, ROWS[:1], ROWS[1:]):  # the same name, and times that a file system may round to the same
            put(tmp_path, {name: rows})
            os.utime(tmp_path / name, (1, 1))
            assert [row for _, row in read(tmp_path / name)] == rows
    assert [row for _, row in read(tmp_path / "set")] == ROWS[1:] * 2
    assert not (tmp_path / "home").exists() and before == (set(os.listdir(home)) if os.path.isdir(home) else set())


CALLS = [
    {"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"c": "Oslo"}}}]},
                  {"role": "tool", "name": "w", "content": "12 C"}, {"role": "assistant", "content": "12", "weight": 1}]},
    {"messages": [{"role": "user", "content": "Time?"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "t", "arguments": {"zone": 3}}}]},
                  {"role": "tool", "tool_call_id": "1", "content": "12 h"}, {"role": "assistant", "content": "noon", "reasoning_content": "12"}]},
]


@pytest.mark.parametrize("kind", ARROWS)
def test_what_arrow_fills_with_none_changes_nothing(tmp_path, kind):
    path = tmp_path / f"data{kind}"
    ARROWS[kind](CALLS, path)
    (tmp_path / "a.jsonl").write_bytes(lines(CALLS))
    assert [read_dialogue(row) for _, row in read(path)] == [read_dialogue(row) for _, row in read(tmp_path / "a.jsonl")]


def test_values_of_mixed_types_that_datasets_writes_as_json(tmp_path):
    features = Features({"messages": List(Json()), "tools": List(Json())})
    tools = [{"name": "w", "default": 3}, {"name": "t", "default": "x"}]
    rows = Dataset.from_dict({"messages": [row["messages"] for row in CALLS], "tools": [tools, tools]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(str(tmp_path / "a.parquet"))
    expected = [read_dialogue({**row, "tools": tools}) for row in CALLS]
    for name in ("saved", "a.parquet"):
        assert [read_dialogue(row) for _, row in read(tmp_path / name)] == expected


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
TABLE = st.lists(st.fixed_dictionaries({"prompt": TEXT, "response": TEXT, "answer": TEXT}), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TABLE)
def test_the_same_rows_come_out_of_every_format(tmp_path, rows):
    for ending, write in TEXTS.items():
        (tmp_path / f"data{ending}").write_bytes(write(rows))
    for ending in (".parquet", ".arrow", ".file.arrow"):
        ARROWS[ending](rows, tmp_path / f"data{ending}")
    for ending in (*TEXTS, ".parquet", ".arrow", ".file.arrow"):
        assert [row for _, row in read(tmp_path / f"data{ending}")] == rows, ending


def test_which_sources_are_the_same_rows(tmp_path, monkeypatch):
    put(tmp_path, {"a.jsonl": ROWS, "b.jsonl": ROWS, "set/train.jsonl": ROWS})
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved_dict")
    monkeypatch.chdir(tmp_path)
    a = str(tmp_path / "a.jsonl")
    for other in (a, "a.jsonl", "./set/../a.jsonl", "link.jsonl"):
        assert same_rows(a, "train", other, "train") and same_rows(a, "train", other, "test")
    assert not same_rows(a, "train", "b.jsonl", "train")
    for folder in ("set", "saved_dict"):
        assert same_rows(folder, "train", str(tmp_path / folder), "train") and not same_rows(folder, "train", folder, "test")
    assert same_rows("saved", "train", "./saved", "test")
    assert same_rows("org/name", "train", "org/name", "train") and not same_rows("org/name", "train", "org/name", "test")
    assert same_rows("demo:train", "train", "demo:train", "test") and not same_rows("demo:train", "train", "demo:heldout", "train")
