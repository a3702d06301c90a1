"""A run whose directory is on an object store: killed with all its processes, gone on from there alone, and finished."""

import json
import os
import subprocess
import sys
import time
import uuid
from io import BytesIO

import psutil
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSelector, FileSystem
from test_run import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.storage import ObjectStore

NUM_PROMPTS = 320


def start(url, scratch, *settings: str) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "spin_ray", "run", "conf/demo.yaml", f"run.dir={url}", "run.name=far", f"run.scratch={scratch}",
         "spin.num_iterations=1", f"data.max_prompts={NUM_PROMPTS}", "data.eval=''", "sampler.block_prompts=32", "learner.batch_pairs=8",
         "learner.checkpoint_every_steps=5", *settings],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("lora.rank=16",)], ids=["all weights", "an adapter"])
def test_killed_run_goes_on_from_the_store_alone(object_store, settings, tmp_path):
    url = object_store % uuid.uuid4().hex
    store, base = FileSystem.from_uri(url)
    base += "/far"

    def read(name: str) -> bytes:
        return store.open_input_stream(f"{base}/{name}").read()

    def files(folder: str) -> dict[str, int]:
        return {info.base_name: info.mtime_ns for info in store.get_file_info(FileSelector(f"{base}/{folder}")) if info.is_file}

    process, until = start(url, tmp_path / "first", *settings), time.monotonic() + 900
    while not store.get_file_info(f"{base}/iter_000/progress/count.json").is_file:
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=10)[0][-3000:]
        time.sleep(0.1)
    for killed in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        killed.kill()
    process.communicate()
    blocks, steps = files("iter_000/pairs"), json.loads(read("iter_000/progress/count.json"))["steps"]
    assert blocks and b"iteration" not in read("manifest.jsonl")

    process = start(url, tmp_path / "second", *settings)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output[-3000:]
    shown = url.partition("?")[0] + "/far"
    assert f"finished: the model is {shown}/iter_000/model" in output
    after = files("iter_000/pairs")
    assert {name: after[name] for name in blocks} == blocks  # not played again
    pairs = [row for name in sorted(after) for row in pq.read_table(BytesIO(read(f"iter_000/pairs/{name}"))).to_pylist()]
    assert sorted(row["prompt_id"] for row in pairs) == list(range(NUM_PROMPTS))
    records = [json.loads(line) for line in read("metrics.jsonl").splitlines()]
    assert [record["step"] for record in records if "train/loss" in record][-(40 - steps):] == list(range(steps, 40))
    marks = [json.loads(line) for line in read("manifest.jsonl").splitlines()]
    assert [mark["stage"] for mark in marks if mark["stage"] not in ("checksums", "first_adapter")] == ["prepared", "iteration", "finished"]
    assert not files_below(store, f"{base}/iter_000/progress") and files_below(store, f"{base}/iter_000/checkpoint")
    assert read("timeline.png")[:4] == b"\x89PNG" and read("logs/sampler-0.log") and files_below(store, f"{base}/wandb")
    for name in ("config.json", "logs/driver.log", "logs/learner-0.log"):
        assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in read(name)

    again = start(url, tmp_path / "third", *settings)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and f"{shown} is finished" in output
    reader = ObjectStore(url, tmp_path / "reader")
    model = reader.fetch(tmp_path / "reader/far/iter_000/model")
    assert files_below(store, f"{base}/iter_000/adapter") or not settings
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() > 0 and AutoTokenizer.from_pretrained(model).chat_template


def files_below(store: FileSystem, folder: str) -> list[str]:
    infos = store.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    return [info.path for info in infos if info.is_file]
