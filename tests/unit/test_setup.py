"""`make setup`: what it says when all is well, and when it is not. Python and pip are shell scripts that play their parts."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "cluster/setup.sh"
PYTHON = """#!/bin/sh
[ "$1" = -c ] && { [ -n "$BROKEN" ] && exit 1; echo ${VERSION:-3.11}; exit 0; }
if [ "$2" = venv ]; then
  [ -n "$NO_VENV" ] && { echo "ensurepip is not available."; exit 1; }
  mkdir -p .venv/bin && cp "$0" .venv/bin/python; exit 0
fi
for k in $(seq 40); do echo "WARNING: a retry, $k" >&2; done
[ -n "$HANG" ] && { echo began >> hangs; sleep 60; }
echo "$@" >> calls
[ -n "$PIP_FAILS" ] && { echo "ERROR: no matching distribution" >&2; exit 1; }
exit 0
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "cluster").mkdir()
    shutil.copy(SETUP, tmp_path / "cluster")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def setup(checkout, **env):
    return subprocess.run(
        [checkout / "cluster/setup.sh"], env={**os.environ, "PYTHON": str(checkout / "python"), "PROFILE": "cpu", **env},
        capture_output=True, text=True, timeout=60,
    )


def test_two_lines_when_all_is_well_and_pip_s_words_in_a_file(checkout):
    done = setup(checkout)
    first, last = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == ""
    assert first == "setup: installing into .venv, which takes some minutes; log: .venv/setup.log" and last.startswith("setup: done in ")
    assert (checkout / ".venv/setup.log").read_text().count("WARNING") >= 40


def test_a_failure_shows_the_end_of_the_log_and_fails(checkout):
    done = setup(checkout, PIP_FAILS="yes")
    assert done.returncode == 1 and "ERROR: no matching distribution" in done.stderr and "WARNING" not in done.stderr
    assert setup(checkout).returncode == 0


@pytest.mark.parametrize("env, line", [
    ({"VERSION": "3.10"}, "is Python 3.10; spin_ray needs 3.11 or 3.12"), ({"VERSION": "3.14"}, "is Python 3.14; spin_ray needs"),
    ({"BROKEN": "yes"}, "does not run; install Python 3.11 or 3.12"), ({"NO_VENV": "yes"}, "apt install python3.11-venv): ensurepip"),
])
def test_what_can_be_known_before_pip_is_one_line(checkout, env, line):
    done = setup(checkout, **env)
    assert done.returncode == 1 and line in done.stderr and done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists() and not (checkout / "calls").exists()


def test_half_a_venv_is_made_anew(checkout):
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to("/nowhere/python")
    done = setup(checkout)
    assert done.returncode == 0 and "only half there: making it anew" in done.stderr


def test_an_interrupted_setup_says_how_to_go_on(checkout):
    env = {**os.environ, "PYTHON": str(checkout / "python"), "HANG": "yes"}
    setting_up = subprocess.Popen(
        [checkout / "cluster/setup.sh"], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in a shell's background ignore it
    )
    while not (checkout / "hangs").exists():
        time.sleep(0.05)
    os.killpg(setting_up.pid, signal.SIGINT)
    said = setting_up.communicate(timeout=30)[1]
    assert setting_up.returncode == 130 and "the same command goes on where this one stopped" in said
