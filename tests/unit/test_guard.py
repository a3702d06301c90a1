"""Bad numbers: when a run is rolled back, when it is stopped, and when nothing is wrong. No Ray, no model."""

import dataclasses
import math
import threading
from pathlib import Path

import pytest
import ray

from spin_ray.__main__ import COMMANDS, main
from spin_ray.config import Config, GuardConfig, ModelConfig, RunConfig, SamplerConfig
from spin_ray.errors import Diverged, EngineFailed, in_one_line
from spin_ray.exchange.pairs import check_logps
from spin_ray.guard import FirstAnswers, Rollbacks, check_nll
from spin_ray.interrupt import Interrupts
from spin_ray.learner.group import follow
from spin_ray.learner.messages import Divergence
from spin_ray.manifest import RunDir
from spin_ray.overlap import BlockSpec
from spin_ray.records import PAIR_SCHEMA, Version, to_table

PATH = "runs/x/iter_002/pairs/block_00000.parquet"


class Chat:
    def decode(self, ids):
        return " ".join(str(i) for i in ids if i > 1)  # 0 and 1 are special


def answers(make_pairs, generated, *, real=3, cut=()):
    """A block whose pairs have these generated ids, real answers of so many tokens, and a cut at these places."""
    pairs = make_pairs(len(generated))
    return to_table([
        dataclasses.replace(
            pair, generated_ids=pair.generated_ids[:0] if ids is None else pair.generated_ids[:1] * 0 + ids,
            real_ids=pair.real_ids.repeat(real)[:real], finish_reason="length" if place in cut else "stop",
        )
        for place, (pair, ids) in enumerate(zip(pairs, generated, strict=True))
    ], PAIR_SCHEMA)


@pytest.fixture
def first_answers():
    config = Config(guard=GuardConfig(num_answers=8, max_empty_share=0.9, max_truncated_share=0.9), sampler=SamplerConfig(max_new_tokens=5))
    return FirstAnswers(config, Chat())


def test_an_opponent_that_answers_nothing_stops_the_run(first_answers, make_pairs):
    empty = [None, 1, 0, 1]
    assert first_answers.look(2, answers(make_pairs, empty), PATH) == {}
    with pytest.raises(Diverged, match=r"iteration 2: 8 of the opponent's first 8 answers are empty, a share of 1.000 .*block_00000.parquet, and theta_2"):
        first_answers.look(2, answers(make_pairs, empty), PATH)


def test_one_real_answer_in_eight_is_enough_and_later_ones_are_not_judged(first_answers, make_pairs):
    assert first_answers.look(2, answers(make_pairs, [1, 1, 1, 9]), PATH) == {}
    assert first_answers.look(2, answers(make_pairs, [1] * 4), PATH) == {"empty_share": 7 / 8, "truncated_share": 0.0}
    assert first_answers.look(2, answers(make_pairs, [1] * 4), PATH) == {}
    assert first_answers.look(3, answers(make_pairs, [1] * 4), PATH) == {}  # the next iteration's are counted anew


def test_an_opponent_that_never_ends_stops_the_run(first_answers, make_pairs):
    with pytest.raises(Diverged, match=r"first 8 answers whose real answer fits into sampler.max_new_tokens are truncated"):
        first_answers.look(0, answers(make_pairs, [9] * 8, real=5, cut=range(8)), PATH)


def test_a_short_limit_that_cuts_real_answers_too_stops_nothing(first_answers, make_pairs):
    for _ in range(3):
        shares = first_answers.look(0, answers(make_pairs, [9] * 8, real=6, cut=range(8)), PATH)
    assert shares == {}


def test_log_probs_that_are_no_numbers(make_pairs):
    pairs = make_pairs(3)
    block = BlockSpec(3, 1, 7, 3, Version(3))
    check_logps(block, to_table(pairs, PAIR_SCHEMA))
    check_logps(block, to_table([dataclasses.replace(p, opponent_real_logps=p.opponent_real_logps[:0]) for p in pairs], PAIR_SCHEMA))
    pairs[1].opponent_real_logps[0] = float("nan")
    with pytest.raises(Diverged, match=r"iteration 3, replay 7: 1 of \d+ opponent_real_logps are not numbers; look at the weights of theta_3"):
        check_logps(block, to_table(pairs, PAIR_SCHEMA))


def test_held_out_nll():
    config = Config(guard=GuardConfig(max_nll_rise_nats=2))
    check_nll(1, 2.4, 0.5, config, PATH)
    for nll in (2.6, float("nan")):
        with pytest.raises(Diverged, match=rf"NLL of theta_1 is {nll:.3f} nats per token, .* above the SFT model's 0.500 \(guard.max_nll_rise_nats=2\)"):
            check_nll(1, nll, 0.5, config, PATH)
    check_nll(1, 99.0, 0.5, Config(guard=GuardConfig(max_nll_rise_nats=0)), PATH)


class Heard:
    """Stands for learner, tracker and terminal: keeps what it is told."""

    def __init__(self, rolls_back=True):
        self.told, self._rolls_back = [], rolls_back

    def roll_back(self, group):
        self.told.append(group)
        return self._rolls_back

    def log(self, group, metrics, **stamp):
        self.told.append(metrics)

    def say(self, text):
        self.told.append(text)


@pytest.fixture
def rollbacks(tmp_path):
    def make(heard, **guard):
        guard = GuardConfig(**{"on_divergence": "rollback", **guard})
        config = Config(run=RunConfig(dir=str(tmp_path)), model=ModelConfig(path="x"), guard=guard)
        run = RunDir.open(config)
        return run, Rollbacks(config, run, heard, heard, heard)

    return make


def divergence(step=4):
    return Divergence(group=3, iteration=1, step=step, error=Diverged(f"iteration 1, step {step}: loss is nan"))


def test_a_rollback_is_done_counted_marked_and_told(rollbacks):
    heard = Heard()
    run, guard = rollbacks(heard)
    guard.answer(divergence())
    guard.answer(divergence(7))
    assert [(mark["iteration"], mark["step"], mark["lr_scale"]) for mark in run.marks("rollback")] == [(1, 4, 0.5), (1, 7, 0.25)]
    assert heard.told[:2] == [3, {"num_rollbacks": 1, "lr_scale": 0.5}]
    assert heard.told[2] == "iteration 1, step 4: loss is nan; rollback 1 of 2: iteration 1 starts over from theta_1 with 0.5 times the learning rate"
    _, resumed = rollbacks(heard)  # the budget is the run's, not the session's
    with pytest.raises(Diverged, match=r"step 4: loss is nan; not rolled back: guard.max_rollbacks=2 of this run are used up"):
        resumed.answer(divergence())


@pytest.mark.parametrize("case, step, played_ahead, why", [
    ({"on_divergence": "stop"}, 4, False, "loss is nan$"),
    ({}, 0, False, "first step's numbers do not depend on the learning rate"),
    ({}, 4, True, "a snapshot of this training has played"),
    ({"max_rollbacks": 0}, 4, False, "max_rollbacks=0 of this run are used up"),
])
def test_where_a_rollback_is_not_wanted_or_no_help_the_run_stops(rollbacks, case, step, played_ahead, why):
    heard = Heard()
    run, guard = rollbacks(heard, **case)
    with pytest.raises(Diverged, match=why):
        guard.answer(divergence(step), played_ahead=played_ahead)
    assert heard.told == [] and run.marks("rollback") == []


def test_a_divergence_of_a_group_that_has_died_meanwhile_counts_as_nothing(rollbacks):
    run, guard = rollbacks(Heard(rolls_back=False))
    guard.answer(divergence())
    assert run.marks("rollback") == []


def test_an_actor_s_error_reaches_the_terminal_without_ray_s_traceback(capsys, monkeypatch):
    """`ray.get` raises an instance of the error's own class whose text is a traceback."""
    raised = ray.exceptions.RayTaskError("score", "Traceback\n  File pool.py\n", EngineFailed("sampler 0: died; see logs")).as_instanceof_cause()
    assert isinstance(raised, EngineFailed) and "Traceback" in str(raised)

    def fails(_):
        raise raised

    monkeypatch.setitem(COMMANDS, "run", COMMANDS["run"]._replace(work=fails))
    assert main(["run", str(Path(__file__).parents[2] / "conf/demo.yaml")]) == 1
    assert capsys.readouterr().err == "spin-ray: sampler 0: died; see logs\n"


def test_errors_in_one_line():
    assert in_one_line(ValueError("Traceback:\n  File x\nRuntimeError: boom\n\n")) == "RuntimeError: boom"
    assert in_one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


class WaitingLearner:
    """Its workers answer nothing until the driver has heard them."""

    def __init__(self, record):
        self._records, self._heard = [record], threading.Event()
        self.coordinator = None

    def result(self, key):
        assert self._heard.wait(30)
        return f"answer to {key}"

    def drain(self):
        records, self._records = self._records, []
        return records

    def heard(self, record):
        self._heard.set()


def test_a_divergence_is_heard_also_where_the_driver_waits_for_something_else_than_a_training():
    divergence = Divergence(1, 0, 3, Diverged("loss is nan"))
    learner = WaitingLearner(divergence)
    assert follow(learner, 5, learner.heard, Interrupts(), patience_s=math.inf) == "answer to 5"

    def stop(record):
        raise record.error

    with pytest.raises(Diverged, match="loss is nan"):
        follow(WaitingLearner(divergence), 5, stop, Interrupts(), patience_s=math.inf)
