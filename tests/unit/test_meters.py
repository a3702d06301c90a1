"""FLOPs and use of rows, against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.learner.meters import ModelFlops, peak_flops, row_use
from spin_ray.records import Pair


def pair(prompt: int, real: int, generated: int) -> Pair:
    ids = [np.full(length, token, np.int32) for token, length in enumerate((prompt, real, generated))]
    return Pair(0, 0, 0, 0, *ids, np.zeros(real, np.float32), np.zeros(generated, np.float32), "stop")


def test_flops_by_hand():
    one = pair(4, 3, 5)
    # Shared: 4 + 2 + 4 tokens; not shared: 2 × 4 + 2 + 4. The output layer sees the 3 + 5 answer tokens.
    assert ModelFlops(1, 0, 0).step([one], share_prompt=True) == 6 * 10
    assert ModelFlops(1, 0, 0).step([one], share_prompt=False) == 6 * 14
    assert ModelFlops(0, 1, 0).step([one], share_prompt=True) == 6 * 8
    # The prompt's tokens attend to 1 + 2 + 3 + 4, y's to 5 + 6, the other's to 5 + 6 + 7 + 8.
    assert ModelFlops(0, 0, 1).step([one], share_prompt=True) == 12 * (10 + 11 + 26)
    assert ModelFlops(0, 0, 1).step([one], share_prompt=False) == 12 * (2 * 10 + 11 + 26)
    alike = replace(one, generated_ids=np.array([1, 1, 2, 2, 2], np.int32))  # its first two tokens are y's, which feeds two
    assert ModelFlops(1, 0, 0).step([alike], share_prompt=True) == 6 * 8
    assert ModelFlops(0, 0, 1).step([alike], share_prompt=True) == 12 * (10 + 11 + 15)


def test_flops_of_a_model_count_its_linear_layers():
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    flops = ModelFlops.of(LlamaForCausalLM(config))
    assert flops == ModelFlops(layers=2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32), head=50 * 16, width=2 * 16)


def test_peak_is_measured_on_a_cpu():
    assert 1e9 < peak_flops(torch.device("cpu"), torch.float32) < 1e15


def test_row_use_counts_what_an_idle_rank_computes():
    use = row_use([[[0, 1], [2]], [[3], []]], [5, 3, 6, 2], pack_tokens=8)
    assert use == {"padding_share": pytest.approx(2 / 18), "pack_fill": pytest.approx(16 / 24)}
