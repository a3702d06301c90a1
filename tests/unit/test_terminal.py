"""What the user sees: something every twenty seconds in a log, one place for what is being done, and nothing when asked for quiet."""

import io
import time

import pytest

from spin_ray import terminal as terminals
from spin_ray.terminal import Terminal


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(terminals, "PLAIN_EVERY_S", 1)


def shown(quiet=False, wait_s=2.6, before=lambda terminal: None):
    file = io.StringIO()
    with Terminal(file, quiet=quiet) as terminal:
        before(terminal)
        time.sleep(wait_s)
    return file.getvalue()


def test_a_log_says_what_is_being_done_though_nothing_happens(soon):
    said = shown(before=lambda terminal: terminal.status("reading [x].jsonl: 3 rows"))
    assert said.count("reading [x].jsonl: 3 rows") >= 2


def test_it_says_how_old_its_news_are(soon, monkeypatch):
    file = io.StringIO()
    with Terminal(file) as terminal:
        terminal.progress("main player", 1, 9, "step 1/9 [now]")
        monkeypatch.setattr(terminals.time, "monotonic", lambda now=time.monotonic: now() + 50)
        time.sleep(1.5)
    assert "main player  step 1/9 [now]  (5" in file.getvalue()


def test_where_something_is_said_often_enough_nothing_is_added(monkeypatch):
    monkeypatch.setattr(terminals, "PLAIN_EVERY_S", 60)
    assert shown(wait_s=1.2, before=lambda terminal: terminal.say("hello")) == "hello\n"


def test_quiet_says_only_how_it_ends(soon):
    def before(terminal):
        terminal.say("news")
        terminal.status("at it")
        terminal.progress("opponent", 1, 2, "half")
        terminal.row({"model": "SFT"})
        terminal.conclude("finished")

    assert shown(quiet=True, before=before) == "finished\n"
