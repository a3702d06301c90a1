"""What a probe says of made-up pairs and tries: signs that give an answer away, verdicts, and the words."""

import dataclasses

import numpy as np
import pytest

from spin_ray.config import load_config
from spin_ray.errors import BadInput
from spin_ray.study.probe import Try, _parts, in_words, probe, raised, signs


@pytest.fixture
def pairs(make_pairs):
    """pairs(real, generated): with such answers, one after the other, and log-probs of -1 everywhere."""

    def made(real, generated, **more):
        found = []
        for pair, y, other in zip(make_pairs(len(real)), real, generated, strict=True):
            own = {"opponent_real_logps": np.full(len(y), -1.0, np.float32), "opponent_generated_logps": np.full(len(other), -1.0, np.float32), "finish_reason": "stop"}
            found.append(dataclasses.replace(pair, real_ids=np.array(y, np.int32), generated_ids=np.array(other, np.int32), **{**own, **more}))
        return found

    return made


def test_nothing_gives_equal_answers_away(pairs):
    same = pairs([[5, 6], [7, 8, 9]], [[5, 6], [7, 8, 9]])
    found = signs(same, same)
    assert [found[name] for name in ("length", "ending", "words", "likelihood")] == [0.5] * 4 and found["same_as_real_share"] == 1


@pytest.mark.parametrize("longer", [True, False])
def test_length_is_a_sign_whichever_is_longer(pairs, longer):
    answers = [[5, 6, 7]] * 4, [[5, 6]] * 4
    found = signs(pairs(*(answers if longer else answers[::-1])), pairs(*(answers if longer else answers[::-1])))
    assert found["length"] == 1.0 and (found["real_tokens"] > found["generated_tokens"]) == longer


def test_a_word_that_only_one_of_them_uses_is_a_sign(pairs):
    train = pairs([[5, 6], [6, 5]], [[5, 9], [9, 5]])
    assert signs(train, pairs([[6, 5]], [[9, 5]]))["words"] == 1.0 and signs(train, pairs([[5, 7]], [[5, 7]]))["words"] == 0.5


def test_a_cut_off_end_and_an_unlikely_answer_are_signs(pairs):
    held = pairs([[5, 6]], [[5, 7]], finish_reason="length", opponent_real_logps=np.array([-3.0, -3.0], np.float32))
    found = signs(held, held)
    assert found["ending"] == 1.0 and found["likelihood"] == 1.0


def tried(lr=3e-4, beta=0.1, accuracy=0.7, change=0.0, diverged=False):
    return Try(lr, beta, accuracy, 0.04, change, 0.01, 0.8, diverged)


@pytest.mark.parametrize("one, verdict", [
    (tried(), "learns"), (tried(accuracy=0.6), "too weak"), (tried(accuracy=0.55), "too weak"), (tried(change=0.2), "log p(y) falls"), (tried(change=2.0), "collapses"),
    (tried(change=float("nan")), "collapses"), (tried(diverged=True), "collapses"),
])
def test_verdicts(one, verdict):
    assert one.verdict == verdict


def test_a_try_is_raised_by_the_root_of_what_it_leaves_out():
    assert raised(own=32, steps=32) == 1 and raised(own=32, steps=128) == 2


def words(*tries):
    config, _ = load_config("conf/demo.yaml", ["spin.lr=3e-4"])
    found = {"length": 0.5, "ending": 0.5, "words": 0.6, "likelihood": 0.4, "real_tokens": 8.0, "generated_tokens": 9.0, "same_as_real_share": 0.3}
    report = {
        "signs": found, "tries": [{**dataclasses.asdict(one), "told_apart": one.told_apart, "verdict": one.verdict} for one in tries], "prompts_per_s": 100.0, "pairs_per_s": 50.0,
        "peak_memory_gib": 0.7,
    }
    return "\n".join(in_words(report, config, 3200, 61.0))


def test_the_words_name_what_is_safe_and_what_it_costs():
    text = words(tried(), tried(lr=9e-4, accuracy=0.8), tried(lr=3e-3, change=1.0))
    assert "Safe here: with beta 0.1 lr from 0.0003 to 0.0009. The best of them: lr 0.0009 with beta 0.1." in text
    assert "The config's own lr 0.0003 and beta 0.1: learns." in text and "collapses" in text
    assert "3200 prompts: 32 s of play beside 64 s of training, up to 2 times that" in text


@pytest.mark.parametrize("tries, says", [
    ([tried(lr=1e-4), tried(), tried(lr=9e-4, change=0.2), tried(lr=3e-3)], "Safe here: with beta 0.1 lr from 0.0001 to 0.0003. "),
    ([tried(lr=1e-4), tried(accuracy=0.5), tried(lr=9e-4), tried(lr=3e-3, change=1.0)], "Safe here: with beta 0.1 lr from 0.0001 to 0.0009. "),
    ([tried(), tried(beta=1.0, change=0.2), tried(lr=9e-4, change=0.2), tried(lr=9e-4, beta=1.0)], "Safe here: with beta 0.1 lr 0.0003. "),
    ([tried(beta=0.01, lr=1e-3), tried(accuracy=0.5), tried(beta=1.0)], "Safe here: with beta 0.01 lr 0.001; with beta 1 lr 0.0003. "),
    ([tried(change=1.0), tried(lr=9e-4, change=2.0)], "No setting here learns without harm"),
    ([tried(accuracy=0.5), tried(lr=9e-4, accuracy=0.55)], "No setting here does harm, and none learns"),
    ([tried(accuracy=0.5), tried(lr=9e-4, accuracy=0.5, change=2.0)], "not even one that ruins the model"),
])
def test_what_is_safe_lies_below_the_first_rate_that_does_harm_each_beta_by_itself(tries, says):
    assert says in words(*tries)


def test_a_grid_whose_every_try_diverges_still_has_a_report(monkeypatch):
    config, _ = load_config("conf/demo.yaml", [])
    found = {"length": 0.5, "ending": 0.5, "words": 0.6, "likelihood": 0.4, "real_tokens": 8.0, "generated_tokens": 9.0, "same_as_real_share": 0.3}
    one = tried(accuracy=0.0, change=float("nan"), diverged=True)
    tries = [{**dataclasses.asdict(one), "told_apart": one.told_apart, "verdict": one.verdict}]
    text = "\n".join(in_words({"signs": found, "tries": tries, "prompts_per_s": 9.0, "pairs_per_s": 0.0, "peak_memory_gib": 0.7}, config, 3, 1.0))
    assert "training that did not get as far as one step" in text


def test_one_prompt_is_not_enough():
    config, _ = load_config("conf/demo.yaml", [])
    with pytest.raises(BadInput, match="one prompt; a probe trains on some"):
        _parts([1], [], config)


def test_only_self_play_is_probed():
    with pytest.raises(BadInput, match="method=sft: probe forecasts self-play"):
        probe("conf/demo_sft.yaml", [])
