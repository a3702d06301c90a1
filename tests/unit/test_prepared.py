"""A run's prompts go through the driver one by one: the same blocks as if all of them were held in memory, and no more of them alive."""

import gc
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from spin_ray.chat import ChatFormat
from spin_ray.config import DataConfig, load_config
from spin_ray.data import kept, load_prompts
from spin_ray.data.kept import Seen
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.exchange import pairs
from spin_ray.exchange.pairs import read_prompts
from spin_ray.lengths import Lengths
from spin_ray.manifest import RunDir
from spin_ray.prepared import prepare, taken_up, written
from spin_ray.records import Prompt
from spin_ray.spool import Spool

FIELDS = ("prompt_id", "answer", "prompt_ids", "real_ids", "rejected_ids")


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(AutoTokenizer.from_pretrained(resolve("demo:base")))


def as_plain(prompts):
    return [tuple(value.tolist() if isinstance(value, np.ndarray) else value for value in (getattr(p, name) for name in FIELDS)) for p in prompts]


def all_in_memory(rows, chat, *, seed, limit, duplicates):
    """What a driver that holds everything makes of rows of text."""
    found, seen = [], set()
    for row in rows:
        asked, real = chat.encode([{"role": "user", "content": row["prompt"]}], row["response"])
        if (key := (tuple(asked), tuple(real))) in seen and duplicates == "drop":
            continue
        seen.add(key)
        found.append((asked, real, str(row["answer"]) if row.get("answer") else None))
    order = np.random.default_rng(seed).permutation(len(found))[: limit or None]
    return [Prompt(k, np.array(found[i][0], np.int32), np.array(found[i][1], np.int32), found[i][2]) for k, i in enumerate(order)]


WORDS = st.sampled_from(["pear", "dog", "knife", "é", "Ω 7", "a" * 30])
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": WORDS, "response": WORDS}, optional={"answer": st.sampled_from(["", "pear", "Ω", 7])}), min_size=1, max_size=40,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, seed=st.integers(0, 5), limit=st.sampled_from([0, 1, 7]), duplicates=st.sampled_from(["drop", "keep"]), size=st.integers(1, 9))
def test_property_the_blocks_are_those_of_a_driver_that_holds_all_rows(tmp_path_factory, chat, rows, seed, limit, duplicates, size):
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(folder / "rows.jsonl")
    prompts, counts = load_prompts(source, DataConfig(train=source, duplicate_rows=duplicates), chat, seed=seed, limit=limit, scratch=folder)
    wanted = all_in_memory(rows, chat, seed=seed, limit=limit, duplicates=duplicates)
    assert as_plain(prompts) == as_plain(wanted) and counts["kept"] == len(wanted)
    assert counts["duplicates"] == len(rows) - len({(row["prompt"], row["response"]) for row in rows})
    run = RunDir(folder / "run")
    run.path.mkdir()
    prepared = written(run, prompts, wanted[:2], size)
    blocks = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    assert [as_plain(read_prompts(run.prompts(k))) for k in range(len(blocks))] == [as_plain(block) for block in blocks]
    assert prepared.block_sizes == [len(block) for block in blocks] and not run.prompts(len(blocks)).exists()
    assert as_plain(prepared.first) == as_plain(wanted[:64]) and as_plain(prepared.heldout) == as_plain(wanted[:2])
    assert prepared.lengths.longest_prompt == max(len(p.prompt_ids) for p in wanted)
    assert prepared.lengths.longest_dialogue == max(len(p.prompt_ids) + len(p.real_ids) for p in wanted)
    assert prepared.lengths.tokens_per_answer == float(np.mean([len(p.real_ids) for p in wanted]))


def test_what_waits_on_the_disk_leaves_no_file(tmp_path, chat):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hi", "response": "Hello"}) + "\n")
    prompts, _ = load_prompts(str(tmp_path / "rows.jsonl"), DataConfig(train="x"), chat, seed=0, scratch=tmp_path / "scratch")
    assert len(prompts) == 1 and list((tmp_path / "scratch").iterdir()) == []


@given(st.lists(st.binary(max_size=9), max_size=40), st.randoms())
@settings(deadline=None)
def test_property_a_spool_gives_back_what_it_took(records, random):
    spool = Spool()
    for number, record in enumerate(records):
        spool.append(record[:3], record[3:])
        again = random.randrange(number + 1)  # also what is not on the disk yet
        assert spool[again] == records[again]
    assert len(spool) == len(records) and [spool[k] for k in range(len(records))] == records


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: open("/dev/full", "w+b", buffering=0))  # noqa: SIM115
    with pytest.raises(BadInput, match=r"scratch: cannot be written: No space left"):
        Spool(tmp_path / "scratch").append(b"x")


@pytest.mark.parametrize("recent", [1, 2, 7])
def test_seen_is_a_set(monkeypatch, recent):
    monkeypatch.setattr(kept, "RECENT", recent)
    rng, seen, known = np.random.default_rng(recent), Seen(), set()
    keys = [bytes([*rng.integers(0, 3, 2), *[0] * 14]) for _ in range(100)] + [bytes([0] * 15 + [k % 9]) for k in range(30)]  # zeros at the ends
    keys += [rng.bytes(16) for _ in range(300)]
    for key in [*keys, *keys]:
        assert seen.add(key) == (key not in known)
        known.add(key)
    lengths = [len(part) for part in seen._sorted]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) <= 10


def alive(kind):
    return sum(type(each) is kind for each in gc.get_objects())


def test_the_driver_never_holds_more_prompts_than_a_block(tmp_path, monkeypatch):
    """2,000 rows in blocks of 50: counted whenever a block is written, and when all is prepared."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Name dog {k}.", "response": f"dog {k}"}) + "\n" for k in range(2000)))
    config, _ = load_config("conf/demo.yaml", [
        f"data.train={path}", "data.eval=", "data.max_prompts=0", f"run.dir={tmp_path}", "run.name=r", "sampler.block_prompts=50", "audit.num_prompts=3",
    ])
    run, before, counts, write = RunDir.open(config), alive(Prompt), [], pairs.write_table
    monkeypatch.setattr(pairs, "write_table", lambda *args: (counts.append(alive(Prompt) - before), write(*args)))
    proof, terminal = Nothing(), Nothing()
    prepared = prepare(config, run, facts_of_demo(), proof, terminal)
    assert len(prepared.block_sizes) == len(counts) == 40 and max(counts) <= 2 * 50
    assert alive(Prompt) - before <= 64 + 2
    counts.clear()
    monkeypatch.setattr(pairs, "from_table", lambda *args, real=pairs.from_table: (counts.append(alive(Prompt) - before), real(*args))[1])
    mark = run.marks("prepared")[-1]
    mark.pop("lengths")  # as earlier versions wrote it
    run.mark(**mark)
    del prepared
    again = taken_up(run, 64)
    assert len(counts) >= 40 and max(counts) <= 64 + 2 * 50 and again.lengths.num_prompts == 2000


class Nothing:
    """In place of the proof and the terminal."""

    def __getattr__(self, name):
        return lambda *args: None


def facts_of_demo():
    return type("Facts", (), {"chat": ChatFormat(AutoTokenizer.from_pretrained(resolve("demo:base")))})


def prompts(number):
    ids = np.random.default_rng(0).integers(5, 500, (number, 12)).astype(np.int32)
    return [Prompt(k, row[: 3 + k % 4], row[6:]) for k, row in enumerate(ids)]


def test_a_resumed_run_reads_the_first_blocks_alone(tmp_path):
    run, made = RunDir(tmp_path), prompts(100)
    first = written(run, made, made[:1], 8)
    for index in range(8, 13):
        run.prompts(index).unlink()
    again = taken_up(run, 64)
    assert again.lengths == first.lengths == Lengths.of(made) and again.block_sizes == first.block_sizes
    assert as_plain(again.first) == as_plain(made[:64])


def test_a_run_of_an_earlier_version_is_read_once(tmp_path):
    run, made = RunDir(tmp_path), prompts(100)
    first = written(run, made, [], 8, train={"kept": 100}, heldout={})
    [mark] = run.marks("prepared")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({name: value for name, value in mark.items() if name != "lengths"}) + "\n")
    again = taken_up(run, 64)
    assert (again.lengths, again.block_sizes) == (first.lengths, first.block_sizes) and as_plain(again.first) == as_plain(first.first)
    assert run.marks("prepared")[-1] == mark
    run.prompts(12).unlink()
    assert taken_up(run, 64).lengths == first.lengths  # the numbers stand in the manifest
    table = pq.read_table(run.prompts(0))
    assert table.column("prompt_id").to_pylist() == list(range(8))
