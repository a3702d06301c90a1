"""Parts of a transfer of weights that need neither Ray nor vLLM."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from spin_ray.background import WATCH_S
from spin_ray.config import WeightsConfig
from spin_ray.config.weights import DEVICES
from spin_ray.errors import WeightsLate
from spin_ray.opponent import Opponent
from spin_ray.records import PublishedWeights, Saved, Version
from spin_ray.transport import transport_of
from spin_ray.transport.receiver import LAST, Handover

BLOCKED = """
import os, threading, time
from spin_ray.background import end_with
parent = os.getppid()
threading.Thread(target=end_with, args=(parent, threading.Event()), daemon=True).start()
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_blocked_worker_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, BLOCKED], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(2 * WATCH_S)
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until and running(child):
        time.sleep(0.1)
    assert not running(child)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("name", DEVICES)
def test_every_transport_is_found_by_its_name_and_has_all_verbs(name):
    transport = transport_of(WeightsConfig(name))
    assert all(callable(getattr(transport, verb)) for verb in ("prepare", "sender", "engine_settings", "load", "serve"))
    assert transport.sender() is None  # none has been started


def test_the_engine_s_thread_does_what_is_asked_in_order_until_the_last_of_it():
    handover, done = Handover(), []
    thread = threading.Thread(target=handover.carry_out, args=(lambda verb, kwargs: done.append((verb, kwargs)),))
    thread.start()
    for verb in ("begin_transfer", "update_weights"):
        handover.ask(verb, {"of": verb}).result(10)
    assert thread.is_alive()
    handover.ask(LAST, {}).result(10)
    thread.join(10)
    assert not thread.is_alive() and done == [("begin_transfer", {"of": "begin_transfer"}), ("update_weights", {"of": "update_weights"}), (LAST, {})]


def test_what_a_worker_raises_the_sender_hears_and_the_engine_breaks_of():
    handover = Handover()

    def refuse(verb, kwargs):
        raise ValueError("another shape")

    asked = handover.ask("update_weights", {})
    with pytest.raises(ValueError, match="another shape"):
        handover.carry_out(refuse)
    with pytest.raises(RuntimeError, match="update_weights: ValueError: another shape"):
        asked.result(1)


def test_what_is_read_in_the_run_directory_is_asked_of_no_sender():
    """Its process has ended with the load that lost the weights: every replica would take that for a failed transfer, and start anew."""
    opponent, loaded = object.__new__(Opponent), []

    def load(weights):
        loaded.append((weights.sender, weights.saved_at))
        if weights.buckets:
            raise WeightsLate("late")

    opponent._overlap, opponent._reporting = SimpleNamespace(first=0), SimpleNamespace(weights_late=lambda error: None)
    opponent.load, opponent._audit = load, lambda version, probed: probed
    published, folder = PublishedWeights(Version(1), ("bucket",), 8, sender="sender"), Saved("folder")
    assert opponent.become(1, iter([published, "probed"]), lambda: folder) == "probed"
    assert loaded == [("sender", None), (None, folder)]
