"""The verbs of a run's storage, against a real S3 server and fsspec's memory: what one node publishes another one finds, whole."""

import dataclasses
import errno
import os
import uuid
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs as pafs
import pytest

from spin_ray.config import Config, DataConfig, ModelConfig, RunConfig
from spin_ray.errors import BadInput
from spin_ray.exchange import pairs as exchange
from spin_ray.learner.coordinator import Base, Joined
from spin_ray.learner.loop import Worker
from spin_ray.learner.messages import Count, Save
from spin_ray.manifest import RunDir
from spin_ray.records import PAIR_SCHEMA, Saved, to_table
from spin_ray.storage import DISK, Disk, ObjectStore, _connect, open_storage


@pytest.fixture(params=["s3", "memory"])
def nodes(request, tmp_path):
    """Two nodes of one run on an object store."""
    name = f"runs-{uuid.uuid4().hex}"
    url = request.getfixturevalue("object_store") % name if request.param == "s3" else f"memory://test/{name}"
    return ObjectStore(url, tmp_path / "here"), ObjectStore(url, tmp_path / "there")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_published_file_is_found_on_another_node_and_so_is_its_end(nodes):
    here, there = nodes
    mine, other = here.root / "demo/manifest.jsonl", there.root / "demo/manifest.jsonl"
    assert not there.exists(other) and not there.fetch(other).exists()
    for text in ("one", "one two"):
        here.publish(write(mine, text))
        assert there.exists(other) and there.fetch(other).read_text() == text
    here.remove(mine)
    assert not mine.exists() and not here.exists(mine) and not there.fetch(other).exists()
    here.remove(mine)  # twice does no harm
    here.publish(mine)  # nor does what is not there


def test_a_written_file_is_there_whole_or_not_at_all(nodes):
    here, there = nodes
    path = here.root / "demo/count.json"
    with pytest.raises(RuntimeError), here.written(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not here.exists(path) and list(path.parent.iterdir()) == []
    with here.written(path) as temporary:
        temporary.write_text("whole")
    assert there.fetch(there.root / "demo/count.json").read_text() == "whole"


def test_a_folder_that_two_nodes_write_is_one_folder_and_leaves_nothing_behind(nodes):
    path = "demo/iter_000/checkpoint"
    for node, rank in zip(nodes, ("0", "1"), strict=True):
        assert node.leads(rank=int(rank), local_rank=0) and not node.leads(rank=0, local_rank=1)
        write(node.draft(node.root / path) / "left by a dead worker", "x")
        node.prepare(node.root / path)
        write(node.draft(node.root / path) / "state" / rank, rank * 1000)
    for node in nodes:
        node.upload(node.root / path)
    nodes[0].commit(nodes[0].root / path)
    assert not list(nodes[0].root.rglob("state"))
    found = nodes[1].fetch(nodes[1].root / path)
    assert {file.name: file.read_text() for file in found.rglob("*") if file.is_file()} == {"0": "0" * 1000, "1": "1" * 1000}


def test_a_fetched_folder_is_what_the_store_has_and_is_fetched_once(nodes):
    here, there = nodes
    model, copy = here.root / "demo/model", there.root / "demo/model"
    write(model / "a", "weights"), write(model / "b", "config")
    here.publish(model)
    write(copy / "model-00002.safetensors", "of an earlier run")
    there.fetch(copy)
    assert sorted(file.name for file in copy.iterdir()) == ["a", "b"]
    inodes = [os.stat(copy / name).st_ino for name in "ab"]
    there.fetch(copy)
    if here.url.startswith("s3"):  # memory keeps no times
        assert [os.stat(copy / name).st_ino for name in "ab"] == inodes
    write(copy / "a", "damaged")
    assert (there.fetch(copy) / "a").read_text() == "weights"
    assert there.checksums(copy) == here.checksums(model) == DISK.checksums(copy) and len(there.checksums(copy)) == 2


def test_a_model_of_the_user_s_is_left_where_it_is(nodes, tmp_path):
    assert nodes[0].fetch(tmp_path / "my_model") == tmp_path / "my_model"


def test_errors_of_the_store_name_the_file_in_one_line(object_store, tmp_path):
    storage = ObjectStore((object_store % "runs").replace("//bucket", "//no-such-bucket"), tmp_path)
    with pytest.raises(BadInput, match=r"^s3://no-such-bucket/runs/demo/x: .*NO_SUCH_BUCKET.*the same command") as caught:
        storage.publish(write(tmp_path / "demo/x", "x"))
    assert "\n" not in str(caught.value) and "hush-hush" not in str(caught.value)


def config(url, scratch, **more) -> Config:
    return Config(run=RunConfig(name="r", dir=url, scratch=str(scratch), **more), model=ModelConfig(path="m"), data=DataConfig(train="t"))


def test_storage_that_nothing_knows_is_refused(tmp_path):
    assert open_storage(config(str(tmp_path), tmp_path)) is DISK
    with pytest.raises(BadInput, match=r"run\.dir=nowhere://x: no such storage"):
        open_storage(config("nowhere://x", tmp_path))


def test_a_run_goes_on_from_the_store_alone(object_store, tmp_path):
    url = object_store % uuid.uuid4().hex
    run = RunDir.open(config(url, tmp_path / "first"))
    with run.locked():
        run.mark("prepared", block_sizes=[3])
        write(run.path / "metrics.jsonl", "{}\n"), write(run.logs / "sampler-0.log", "hello")
        write(run.model(0) / "weights", "w"), run.storage.publish(run.model(0))
        run.mark_checksums(0, [run.model(0)])
    again = RunDir.open(config(url, tmp_path / "second"))
    with again.locked():
        assert again.marks("prepared") == [{"stage": "prepared", "block_sizes": [3]}]
        assert (again.path / "metrics.jsonl").read_text() == "{}\n"
        again.mark("iteration", iteration=0)
        again.check_weights(0, [again.model(0)])
        assert str(again) == url.split("?")[0] + "/r"
    store, base = _connect(url)
    assert store.open_input_stream(f"{base}/r/manifest.jsonl").read().decode().count("\n") == 3
    assert store.open_input_stream(f"{base}/r/logs/sampler-0.log").read() == b"hello"
    with pytest.raises(BadInput, match=r"s3://bucket/.*/r belongs to a run with another config \(run\.seed: 0 -> 1\)"):
        RunDir.open(config(url, tmp_path / "third", seed=1))
    with store.open_output_stream(f"{base}/r/iter_000/model/weights") as file:
        file.write(b"v")
    with pytest.raises(BadInput, match=r"s3://bucket/.*/r/iter_000/model/weights: missing or damaged"):
        again.check_weights(0, [again.model(0)])


def test_a_block_crosses_the_store_and_a_damaged_one_is_noticed(nodes, make_pairs):
    here, there = nodes
    path, copy = here.root / "r/pairs/block.parquet", there.root / "r/pairs/block.parquet"
    table = to_table(make_pairs(20), PAIR_SCHEMA)
    exchange.write_table(path, table, here)
    assert exchange.pairs_on_disk(there.fetch(copy)) == table
    store, key = here._key(path)
    whole = store.open_input_stream(key).read()
    with store.open_output_stream(key) as file:
        file.write(whole[: len(whole) // 2])
    assert exchange.pairs_on_disk(there.fetch(copy)) is None


class FullDisk(SimpleNamespace):
    """A main player whose writes find no room."""

    rank = 0

    def wait_for_all_ranks(self):
        pass

    def export(self, folder, bucket_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_under_export_commit_and_manifest_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    worker = Worker(FullDisk(), SimpleNamespace(coordinator=None, storage=DISK), Joined(Base(Saved(""), None), 1, 0))
    with pytest.raises(BadInput, match="iter_000/model: cannot be written: No space left on device"):
        worker._save(Save(str(tmp_path / "iter_000/model")))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunDir(tmp_path)
    run.mark("prepared")
    write(DISK.draft(run.checkpoint(0)) / "state", "x")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="iter_000/checkpoint: cannot be written: No space left on device"):
        DISK.commit(run.checkpoint(0))
    assert not run.checkpoint(0).exists()
    with pytest.raises(BadInput, match=r"manifest\.jsonl: cannot be written: No space left on device"):
        run.mark("iteration")


class Saver(SimpleNamespace):
    """A main player of one number, which it saves and loads."""

    rank = 0
    state = 0

    def wait_for_all_ranks(self):
        pass

    def begin_iteration(self):
        self.state = 0

    def save_checkpoint(self, folder):
        write(folder / "state" / "rank_0", str(self.state))

    def load_checkpoint(self, folder, *, name):
        self.state = int((folder / "state" / "rank_0").read_text())


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_progress_is_replaced_as_a_whole_and_a_save_that_is_cut_short_changes_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    url = f"memory://test/{uuid.uuid4().hex}"

    def worker(node):
        storage = DISK if kind == "disk" else ObjectStore(url, tmp_path / node)
        worker = Worker(Saver(), SimpleNamespace(coordinator=None, storage=storage), Joined(Base(Saved(""), None), 1, 0))
        worker._log = lambda _: None
        progress = tmp_path / ("run" if kind == "disk" else node) / "iter_000/progress"
        return worker, SimpleNamespace(progress_path=str(progress)), storage

    first, command, storage = worker("here")
    assert first._take_up(command) == Count()
    for first._player.state in (5, 10):
        first._save_progress(command, Count(steps=first._player.state))
    first._player.state = 15
    monkeypatch.setattr(storage.__class__, "written", lambda *_: 1 / 0)  # between the folder and its mark
    with pytest.raises(ZeroDivisionError):
        first._save_progress(command, Count(steps=15))
    monkeypatch.undo()
    monkeypatch.setenv("LOCAL_RANK", "0")
    second, command, storage = worker("there")
    assert second._take_up(command).steps == 10 == second._player.state
    progress = Path(command.progress_path)
    assert [storage.exists(progress / f"step_{steps}") for steps in (5, 10, 15)] == [False, True, True]
    second._player.state = 15
    second._save_progress(command, Count(steps=15))
    third, command, storage = worker("elsewhere")
    assert third._take_up(command).steps == 15 == third._player.state
    assert not storage.exists(Path(command.progress_path) / "step_10")


def test_damaged_progress_is_named(tmp_path):
    write(tmp_path / "count.json", '{"steps": 5, "p')
    worker = Worker(Saver(), SimpleNamespace(coordinator=None, storage=DISK), Joined(Base(Saved(""), None), 1, 0))
    with pytest.raises(BadInput, match=r"count\.json: damaged .*begin the iteration's training again"):
        worker._take_up(SimpleNamespace(progress_path=str(tmp_path)))


def test_a_committed_folder_replaces_the_earlier_one(tmp_path):
    for text in ("one", "two"):
        DISK.prepare(tmp_path / "model")
        write(DISK.draft(tmp_path / "model") / text, text)
        DISK.commit(tmp_path / "model")
        assert [file.name for file in (tmp_path / "model").iterdir()] == [text] and len(list(tmp_path.iterdir())) == 1


def test_storages_have_the_same_verbs_and_pickle(nodes):
    import pickle

    assert pickle.loads(pickle.dumps(nodes[0])) == nodes[0]
    verbs = {name for name in vars(ObjectStore) if not name.startswith("_")} - {field.name for field in dataclasses.fields(ObjectStore)}
    assert verbs <= vars(Disk).keys()


def test_a_damaged_manifest_or_config_is_named(tmp_path):
    run = RunDir.open(config(str(tmp_path), tmp_path))
    write(run.path / "manifest.jsonl", '{"stage": "prep\x00\n')
    with pytest.raises(BadInput, match=r"manifest\.jsonl: damaged"):
        run.marks("prepared")
    write(run.path / "config.json", "{")
    with pytest.raises(BadInput, match=r"config\.json: damaged"):
        RunDir.open(config(str(tmp_path), tmp_path))


def test_ray_train_is_told_of_the_store(nodes):
    words = nodes[0].for_ray_train(nodes[0].root / "r/logs")
    assert words["storage_path"].endswith("/r/logs") and isinstance(words["storage_filesystem"], pafs.FileSystem)
    assert DISK.for_ray_train(nodes[0].root) == {"storage_path": str(nodes[0].root)}
