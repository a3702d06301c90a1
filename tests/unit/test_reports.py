"""When the driver acts on what the learner's workers report, how an error ends all waits, and what the user reads of a step."""

import itertools
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from spin_ray.background import Threads, in_background
from spin_ray.config import load_config
from spin_ray.errors import Diverged, RunStopped
from spin_ray.learner.messages import Divergence, Saving, StepRecord, TrainReport
from spin_ray.learner.reports import Reports
from spin_ray.manifest import RunDir
from spin_ray.methods import method_of
from spin_ray.overlap import Overlap
from spin_ray.preflight import Proof
from spin_ray.records import Span
from spin_ray.reporting import Reporting
from spin_ray.terminal import Terminal


def step(t, number, group):
    return StepRecord(t, number, 4, {}, group)


@pytest.mark.parametrize("place", range(4))
def test_reports_of_an_iteration_wait_until_its_theta_stands_and_keep_their_order(place):
    heard = []
    reports = Reports(heard.append)
    reports.stands(0, group=0)
    of_1 = [step(1, 0, 1), Divergence(1, 1, 1, Diverged("")), step(1, 2, 1)]
    for number, report in enumerate(of_1):
        if number == place:
            reports.stands(1, group=1)
            assert heard == of_1[:number]
        reports.arrived(report)
        assert heard == (of_1[: number + 1] if number >= place else [])
    reports.stands(1, group=1)
    assert heard == of_1


def test_spans_and_saves_pass_at_once():
    heard = []
    reports = Reports(heard.append)
    for report in (Span("main player", "train", 1, 0.0, 1.0), Saving()):
        reports.arrived(report)
        assert heard[-1] is report


@pytest.mark.parametrize("made_by", [1, 2, 3])
def test_what_a_group_said_of_a_theta_that_was_lost_is_never_heard(made_by):
    """Groups 1, 2 and 3 have each begun iteration 1; the theta_1 of one of them stands."""
    heard = []
    reports = Reports(heard.append)
    reports.stands(0, group=0)
    for group in (1, 2, 3):
        reports.arrived(step(0, 3, group))
        reports.arrived(step(1, 0, group))
    reports.stands(1, group=made_by)
    assert [report.group for report in heard if report.iteration == 0] == [1, 2, 3]
    assert [report.group for report in heard if report.iteration == 1] == list(range(made_by, 4))  # later groups began at that theta_1


def test_a_late_word_of_a_group_that_is_gone_is_not_heard():
    heard = []
    reports = Reports(heard.append)
    reports.stands(0, group=0)
    for report in (step(0, 7, 1), step(0, 5, 2), step(0, 8, 1), step(0, 6, 2)):
        reports.arrived(report)
    assert [(report.group, report.step) for report in heard] == [(1, 7), (2, 5), (2, 6)]


@pytest.mark.parametrize("order", list(itertools.permutations(["fails", "is asked", "answers"])))
def test_the_first_error_ends_every_wait_whatever_comes_first(order):
    told, answer, asked = [], Future(), []
    threads = Threads(told.append)
    first = RunStopped("first")
    for event in order:
        if event == "fails":
            with pytest.raises(RunStopped):
                threads.start(fails, first).result(60)
        elif event == "answers":
            answer.set_result("answer")
            if asked and "fails" not in order[: order.index(event)]:
                assert asked[0].result(60) == "answer"
        else:
            asked.append(in_background(threads.result, answer))
    if order.index("fails") < order.index("answers") or order.index("fails") < order.index("is asked"):
        assert asked[0].exception(60) is first
    threads.fail(RunStopped("follow-up"))
    assert told == [first]
    with pytest.raises(RunStopped, match="first"):
        threads.finish()


def test_an_error_ends_a_wait_that_nobody_would_answer():
    threads = Threads()
    threads.start(threading.Event().wait)
    waiting = in_background(threads.finish)
    assert not threads.settled(Future(), timeout_s=0.01)
    threads.fail(RunStopped("enough"))
    assert str(waiting.exception(60)) == "enough" and threads.settled(Future(), timeout_s=60)


def fails(error):
    raise error


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_terminal_shows_spin_s_loss_apart_from_the_nll_term(tmp_path, weight, monkeypatch):
    """README promises a first loss of 0.693, whatever is added to it."""
    monkeypatch.setattr("spin_ray.terminal.PLAIN_EVERY_S", 0)
    config, _ = load_config("conf/demo.yaml", [f"run.dir={tmp_path}", f"spin.nll_weight={weight}", "spin.num_iterations=1"])
    method, logged = method_of(config), []
    tracker = SimpleNamespace(log=lambda group, metrics, **stamp: logged.append((group, metrics)))
    with (tmp_path / "terminal").open("w") as file, Terminal(file) as terminal:
        reporting = Reporting(config, method, RunDir.open(config), None, Overlap(config, method, [4]), Proof(), tracker, terminal)
        loss = 0.693 + weight * 0.704
        reporting.step(StepRecord(0, 0, 1, {"loss": loss, "pair_loss": 0.693, "margin": 0.0, "pairs_per_s": 9.0, "waited_s": 0.0}, 1))
        reporting.spans([Span("main player", "train", 0, 1.0, 2.0), Span("opponent 0", "play", 0, 0.0, 1.0)])
        row = reporting.trained(0, TrainReport(1, 4, 9, 1.0, 0.0, 0.693, 0.693, 0.0), num_restarts=0)
        reporting.row(0, {}, {})
        reporting.row(1, {}, row)
    step_line, header, _, last = (tmp_path / "terminal").read_text().splitlines()
    assert "loss 0.693  " + ("NLL term 0.176  " if weight else "") + "margin 0.00" in step_line
    assert ("NLL term" in header) == bool(weight) and ("0.693     0.176" in last) == bool(weight) and "0.693" in last
    assert dict(logged)["train"]["loss"] == loss and dict(logged)["train"]["pair_loss"] == 0.693
