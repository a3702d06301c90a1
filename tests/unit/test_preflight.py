"""The proof at the door: which pairs it takes, and what the driver says."""

import itertools

import numpy as np
import pytest

from spin_ray.preflight import MAX_TOKENS, NUM_PAIRS, proof_pairs
from spin_ray.records import Prompt


def prompts(*lengths):
    return [Prompt(k, np.full(x, k, np.int32), np.full(y, 100 + k, np.int32)) for k, (x, y) in enumerate(lengths)]


def tokens(pairs):
    return sum(len(pair.prompt_ids) * 2 + len(pair.real_ids) + len(pair.generated_ids) for pair in pairs)


def test_several_different_pairs_the_longest_that_fit():
    pairs = proof_pairs(prompts((10, 10), (900, 900), (60, 40), (20, 20), (30, 30), (5, 5), (7, 7)))
    assert [pair.prompt_id for pair in pairs] == [2, 4, 3, 0] and len(pairs) == NUM_PAIRS and tokens(pairs) <= MAX_TOKENS
    for pair in pairs:
        assert pair.real_ids[0] != pair.generated_ids[0]  # two answers that differ, as a sampled one does


@pytest.mark.parametrize("lengths", [[(900, 900), (800, 800), (700, 700)], [(900, 900), (5, 5)]])
def test_two_pairs_also_where_none_or_one_fits(lengths):
    assert len(proof_pairs(prompts(*lengths))) == 2


def test_one_prompt_is_a_pair_with_itself():
    [pair] = proof_pairs(prompts((5, 6)))
    assert (len(pair.prompt_ids), len(pair.real_ids), len(pair.generated_ids)) == (5, 6, 6)


def test_the_same_prompts_give_the_same_pairs():
    made = [proof_pairs(prompts(*itertools.repeat((8, 8), 200))) for _ in range(2)]
    assert [[pair.prompt_id for pair in pairs] for pairs in made] == [[0, 1, 2, 3]] * 2
