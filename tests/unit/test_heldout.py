"""Held-out numbers by hand, and the stop rule on made-up histories."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from spin_ray.config import Config, ModelConfig, RunConfig, SpinConfig
from spin_ray.heldout import advantage, are_right, as_pairs, divergence, quality, standard_error
from spin_ray.losses import LikelihoodObjective, PairObjective
from spin_ray.manifest import RunDir
from spin_ray.records import Completion, Prompt, Version
from spin_ray.stop import Standing, judge


def tokens(*ids):
    return np.array(ids, np.int32)


def logps(*values):
    return np.array(values, np.float32)


PROMPTS = [Prompt(0, tokens(1), tokens(5, 2), "five"), Prompt(1, tokens(1), tokens(6, 7, 2)), Prompt(2, tokens(1), tokens(8, 2), "eight")]
DRAWN = [
    Completion(Version(0), tokens(5, 2), logps(-1, -1), "stop"), Completion(Version(0), tokens(9, 9, 9, 9), logps(-1, -1, -1, -1), "length"),
    Completion(Version(0), tokens(4, 2), logps(-2, -1), "stop"),
]
REAL = [logps(-1, -1), logps(-2, -2, -2), logps(-4, -1)]
BEFORE = as_pairs(0, PROMPTS, DRAWN, REAL)


def decode(ids):
    return {5: "five", 8: "eight"}.get(int(ids[0]), "?")


def test_quality_of_one_version():
    right = are_right(PROMPTS, [pair.generated_ids for pair in BEFORE], decode)
    assert right.tolist() == [True, False] and are_right(PROMPTS[1:2], [tokens(1)], decode) is None
    metrics = {name: value for name, value in quality(BEFORE, right, np.array([True, True])).items() if not name.endswith("_se")}
    assert metrics == pytest.approx({
        "real_nll_nats_per_token": 13 / 7, "generated_tokens": 8 / 3, "real_tokens": 7 / 3, "truncated_share": 1 / 3, "same_as_real_share": 1 / 3,
        "exact_match_t1_share": 0.5, "exact_match_greedy_share": 1.0,
    })
    assert "exact_match_t1_share" not in quality(BEFORE, None, None)


def test_advantage_by_hand():
    # y' is y: equal, a half; r(y) = 3, r(y') = -4: told apart; r(y) = -1, r(y') = 0: not
    now_real, now_generated = [logps(-2, -1), logps(-1, -1, -1), logps(-4, -2)], [logps(-2, -1), logps(-2, -2, -2, -2), logps(-2, -1)]
    metrics = advantage(BEFORE, now_real, now_generated, PairObjective(0.1))
    assert metrics["advantage_accuracy"] == pytest.approx(0.5) and metrics["advantage_nats"] == pytest.approx((0 + 7 - 1) / 3)
    assert metrics["advantage_accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))
    expected = np.mean([math.log(1 + math.exp(-z)) for z in (0, 0.7, -0.1)]) - math.log(2)
    assert metrics["advantage_loss_change"] == pytest.approx(expected)
    assert "advantage_loss_change" not in advantage(BEFORE, now_real, now_generated, LikelihoodObjective())


def test_a_version_that_has_learnt_nothing_is_at_chance():
    metrics = advantage(BEFORE, REAL, [pair.opponent_generated_logps for pair in BEFORE], PairObjective(0.1))
    assert (metrics["advantage_accuracy"], metrics["advantage_nats"], metrics["advantage_loss_change"]) == (0.5, 0, 0)
    assert divergence(BEFORE, [pair.opponent_generated_logps for pair in BEFORE]) == 0


def test_divergence_is_per_token_of_the_earlier_version_s_answers():
    assert divergence(BEFORE, [logps(-2, -1), logps(-1, -1, -1, -3), logps(-2, -1)]) == pytest.approx(3 / 8)


def test_the_estimate_of_the_divergence_is_that_of_two_known_distributions():
    rng, p, q = np.random.default_rng(0), np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    drawn = rng.choice(3, size=(4000, 3), p=p)
    pairs = [SimpleNamespace(opponent_generated_logps=np.log(p)[row]) for row in drawn]
    assert divergence(pairs, [np.log(q)[row] for row in drawn]) == pytest.approx((p * np.log(p / q)).sum(), abs=0.01)


def standing(version, scores, accuracy=(0.9, 0.02), right=True):
    scores = np.array(scores, float)
    return Standing(version, -scores, scores > 0.5 if right else None, accuracy if version else None)


def shares(share, count=400):
    """So many prompts, the first of them right."""
    return np.arange(count) < share * count


NEVER, EQUILIBRIUM, WORSE, EITHER = (SpinConfig(stop=kind) for kind in ("never", "equilibrium", "worse", "either"))


@pytest.mark.parametrize("history, best, stops", [
    ([0.3], 0, set()),
    ([0.3, 0.4, 0.5], 2, set()),
    ([0.3, 0.5, 0.49], 1, set()),  # 4 of 400 prompts: within two standard errors
    ([0.3, 0.5, 0.40], 1, {"worse", "either"}),
    ([0.5, 0.3], 0, {"worse", "either"}),
    ([0.3, 0.3], 0, set()),  # of equals the earlier
])
def test_worse_by_more_than_chance(history, best, stops):
    standings = [standing(version, shares(share)) for version, share in enumerate(history)]
    for spin in (NEVER, EQUILIBRIUM, WORSE, EITHER):
        verdict = judge(standings, spin)
        assert verdict.best == best and bool(verdict.reason) == (spin.stop in stops), spin.stop
    assert not judge(standings, SpinConfig(stop="worse", stop_margin=0.5)).reason


def test_without_checkable_answers_the_nll_decides_prompt_by_prompt():
    """What is hard for both versions is no difference: 0.05 nats more on every prompt count, whatever the prompts differ by."""
    hard = np.random.default_rng(0).exponential(5, 50)
    noisy = hard + np.random.default_rng(1).normal(0.05, 2, 50)
    first = standing(0, -hard, right=False)
    worse = judge([first, standing(1, -hard - 0.05, right=False)], WORSE)
    assert worse.best == 0 and "theta_1's held-out NLL is" in worse.reason and "it gets worse" in worse.reason and "\n" not in worse.reason
    assert judge([first, standing(1, -noisy, right=False)], WORSE).reason == ""
    assert judge([first, standing(1, -hard + 0.05, right=False)], WORSE).best == 1


@pytest.mark.parametrize("accuracy, stops", [((0.9, 0.02), False), ((0.61, 0.02), False), ((0.55, 0.02), True), ((0.5, 0.09), False), ((0.45, 0.02), True)])
def test_equilibrium_only_where_it_is_sure(accuracy, stops):
    standings = [standing(0, shares(0.3)), standing(1, shares(0.4), accuracy)]
    verdict = judge(standings, EQUILIBRIUM)
    assert bool(verdict.reason) == stops and bool(judge(standings, EITHER).reason) == stops and not judge(standings, WORSE).reason
    assert judge(standings, SpinConfig(stop="equilibrium", stop_accuracy=0.95)).reason


def test_a_few_prompts_have_a_large_error():
    assert standard_error(np.array([1.0])) == math.inf and standard_error(np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert not judge([standing(0, [1.0]), standing(1, [0.0])], EITHER).reason


def test_the_best_is_named_in_a_file(tmp_path):
    run = RunDir.open(Config(run=RunConfig(dir=str(tmp_path)), model=ModelConfig(path="sft")))
    assert run.best() is None
    run.name_best("some/sft")
    assert run.best() == "some/sft"
    run.name_best(str(run.model(1)))
    assert run.best() == str(run.model(1)) == (run.path / "best").read_text().strip()
