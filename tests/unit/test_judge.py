"""The judge of a real model's answers: distances against numbers by hand, vectors that padding does not change."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from spin_ray.demo import resolve
from spin_ray.exchange.pairs import write_table
from spin_ray.manifest import RunDir
from spin_ray.records import PAIR_SCHEMA, to_table
from spin_ray.storage import DISK
from spin_ray.study.judge import Encoder, energy_distance, judged


@pytest.mark.parametrize("x, y, distance", [([0, 2], [1, 1], 0.0), ([0, 1], [3, 5], 4.0), ([0, 0], [1, 1], 2.0)])
def test_energy_distance(x, y, distance):
    assert energy_distance(torch.tensor(x)[:, None].float(), torch.tensor(y)[:, None].float()) == pytest.approx(distance)


def test_equal_distributions_have_no_distance():
    torch.manual_seed(0)
    assert abs(energy_distance(torch.randn(500, 4), torch.randn(500, 4))) < 0.02 < energy_distance(torch.randn(500, 4), torch.randn(500, 4) + 0.5)


@pytest.fixture
def folder(tmp_path):
    """A folder of rows with a tiny encoder beside them."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:base"))
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path / "minilm")
    tokenizer.save_pretrained(tmp_path / "minilm")
    return tmp_path


def test_a_text_s_vector_has_length_one_and_does_not_depend_on_its_neighbours(folder):
    encoder, texts = Encoder(folder / "minilm"), ["a fig", "one two three four five", "bear"]
    together = encoder(texts * 30)  # more than a batch
    assert together.shape == (90, 16) and torch.allclose(together.norm(dim=1), torch.ones(90))
    torch.testing.assert_close(together[:3], torch.cat([encoder([text]) for text in texts]), atol=1e-5, rtol=0)


def test_answers_that_are_the_human_ones_are_as_near_as_can_be(folder, make_pairs):
    run = RunDir(folder / "run")
    run.path.mkdir()
    (run.path / "config.json").write_text(json.dumps({"model": {"path": resolve("demo:base")}, "data": {"eval": str(folder / "heldout.jsonl")}}))
    pairs = make_pairs(20)
    for version, changed in enumerate(([{"generated_ids": pair.real_ids, "opponent_generated_logps": np.zeros(len(pair.real_ids), np.float32)} for pair in pairs], [{}] * 20)):
        rows = [type(pair)(**{**vars(pair), **change}) for pair, change in zip(pairs, changed, strict=True)]
        write_table(run.heldout_answers(version), to_table(rows, PAIR_SCHEMA), DISK)
    same, other = judged(run, 0), judged(run, 1)
    assert same["human_similarity"] == pytest.approx(1.0, abs=1e-5) and same["human_similarity"] > other["human_similarity"]
    assert same["human_distance"] < other["human_distance"]
