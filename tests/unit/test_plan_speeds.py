"""Rates of a plan: what was measured comes before what is assumed, and each says where it is from."""

import json

import pytest

from spin_ray.config import load_config
from spin_ray.look.plan.rows import given
from spin_ray.look.plan.speeds import assumed_gpu, from_earlier


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.yaml").write_text(f"run: {{name: one, dir: {tmp_path}}}\nmodel: {{path: demo:sft}}\ndata: {{train: demo:train}}\n")
    return load_config(tmp_path / "c.yaml", ["sampler.max_new_tokens=8"])[0]


def write_run(config):
    config.run_path.mkdir()
    lines = [{"train/tokens_per_s": rate} for rate in (100, 300, 200)]
    lines += [{"sampler/tokens_per_s": rate} for rate in (80, 20)] + [{"sync/total_s": 0.5}]
    (config.run_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (config.run_path / "config.json").write_text(json.dumps({"sampler": {"num_replicas": 2}}))


def write_probe(config):
    folder = config.run_path.with_name("one-probe")
    folder.mkdir()
    told = {"prompts_per_s": 10.0, "pairs_per_s": 4.0, "signs": {"generated_tokens": 6.0}}
    (folder / "probe.json").write_text(json.dumps(told))


def test_nothing_is_known_of_what_has_not_run(config):
    assert from_earlier(config, given(10, 5, 100, config)) == {}


def test_an_earlier_run_of_the_same_name(config):
    write_probe(config)
    write_run(config)
    found = from_earlier(config, given(10, 5, 100, config))
    assert {name: rate.value for name, rate in found.items()} == {"learner": 200, "sampler": 40, "sync": 0.5}  # a replica's, of the first iteration
    assert all(rate.source.startswith("measured: ") and "metrics.jsonl" in rate.source for rate in found.values())


def test_its_probe_where_there_is_no_run(config):
    """4 pairs of 10 + 5 + 5 - 2 = 18 tokens a second; 10 answers of 6 tokens."""
    write_probe(config)
    found = from_earlier(config, given(10, 5, 100, config))
    assert {name: rate.value for name, rate in found.items()} == {"learner": 72, "sampler": 60}
    assert all("probe.json" in rate.source for rate in found.values())


def test_a_gpu_is_taken_for_one_of_its_size():
    assert [assumed_gpu(size).name for size in (24, 40, 80, 141)] == ["an A10", "an A100 of 40 GB", "an A100 of 80 GB", "an H200"]
