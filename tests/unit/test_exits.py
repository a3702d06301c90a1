"""An error that nobody foresaw: one line that says what and where, the traceback in a file, exit code 1."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from spin_ray.__main__ import COMMANDS, main
from spin_ray.chatter import captured_output
from spin_ray.config import flatten
from spin_ray.errors import BadInput
from spin_ray.exits import describe

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "conf/demo.yaml")


class Unreadable(Exception):
    def __str__(self):
        raise ValueError("not even this")


class Panic(BaseException):
    """As Rust's in Python."""


def too_deep(*_):
    return too_deep() + 1


def raised(error):
    def fails(*_):
        raise error
    return fails


@pytest.mark.parametrize("fails, says", [
    (raised(KeyError("x")), "KeyError: 'x'"), (raised(MemoryError()), "MemoryError ("), (raised(RuntimeError("")), "RuntimeError ("),
    (raised(OSError(28, "No space left on device")), "OSError: [Errno 28] No space left on device"),
    (raised(ValueError("one\ntwo\n\n three\nfour\nfive")), "ValueError: one two three four five ("),
    (raised(ValueError("long " * 1000)), "long ... ("), (raised(Unreadable()), "Unreadable: (an error whose own text cannot be read)"),
    (raised(Panic("rust")), "Panic: rust"), (too_deep, "RecursionError: maximum recursion depth exceeded"),
    (raised(BadInput("")), "BadInput ("), (lambda *_: flatten(3), "TypeError: must be called with a dataclass"),
])
def test_every_command_s_unforeseen_error_is_one_line_and_a_file(fails, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for command in ("run", "sft", "eval", "config", "probe", "study"):
        monkeypatch.setitem(COMMANDS, command, COMMANDS[command]._replace(work=fails))
        assert main([command, DEMO]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("spin-ray: ") and printed.err.count("\n") == 1 and says in printed.err and not printed.out
        assert len(printed.err) < 700
        written = Path(re.search(r"traceback in (\S+\.log)$", printed.err.strip())[1])
        assert written.parent == tmp_path and written.read_text().startswith("Traceback (most recent call last)")


def test_the_place_is_our_innermost_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(COMMANDS, "run", COMMANDS["run"]._replace(work=lambda *_: flatten(3)))
    main(["run", DEMO])
    assert re.search(r"\(spin_ray/config/values\.py:\d+, in the driver\)", capsys.readouterr().err)


def test_in_a_run_the_traceback_is_in_the_run_s_log(tmp_path, monkeypatch, capfd):
    def fails(*_):
        with captured_output(tmp_path / "logs/driver.log"):
            flatten(3)

    monkeypatch.setitem(COMMANDS, "run", COMMANDS["run"]._replace(work=fails))
    assert main(["run", DEMO]) == 1
    assert f"traceback in {tmp_path}/logs/driver.log" in capfd.readouterr().err
    assert (tmp_path / "logs/driver.log").read_text().count("Traceback (most recent call last)") == 1


TOLD = f'ray::TITLE (pid=1, ip=127.0.0.1)\nTraceback (most recent call last):\n  File "{ROOT}/spin_ray/sampler/engine.py", line 77, in score\n  File "/lib/vllm/x.py", line 3, in y\nKeyError: 1\n'


@pytest.mark.parametrize("title, process", [
    ("ray::Sampler.score", "a sampler"), ("ray::SamplerPool.load", "the sampler pool"), ("ray::RayTrainWorker.run", "a learner worker"),
    ("ray::MapWorker(PlayBlock)", "Ray's process MapWorker"),
])
def test_the_process_and_the_line_of_an_error_in_an_actor(title, process):
    error = ray.exceptions.RayTaskError("f", TOLD.replace("ray::TITLE", title), KeyError(1), proctitle=title, pid=1, ip="127.0.0.1").as_instanceof_cause()
    assert describe(error, KeyError(1)) == f"KeyError: 1 (spin_ray/sampler/engine.py:77, in {process})"


def test_the_rank_of_a_learner_worker():
    inner = ray.exceptions.RayTaskError("f", TOLD, KeyError(1), proctitle="ray::RayTrainWorker.run", pid=1, ip="127.0.0.1")
    assert describe(WorkerGroupError("many words", {1: inner}), KeyError(1)).endswith("in learner rank 1)")


PRINTS = "import sys; from spin_ray.exits import ends_in_one_line; sys.exit(ends_in_one_line('spin-ray', lambda: print('x', flush=True)))"
GONE = "spin-ray: stopped: whoever read the output is gone; the same command goes on\n"


@pytest.mark.parametrize(("words", "code", "said"), [(["-m", "spin_ray", "config", DEMO], 0, ""), (["-c", PRINTS], 1, GONE)], ids=["prints", "works"])
def test_a_reader_that_goes_away_is_no_traceback(tmp_path, words, code, said):
    command = [sys.executable, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=env, timeout=60)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (code, said)


@pytest.mark.parametrize("config, code", [(DEMO, 0), ("nothing.yaml", 2)])
def test_streams_that_were_closed_before_lead_nowhere(tmp_path, config, code):
    command = f'exec "{sys.executable}" -m spin_ray config "{config}" <&- >&- 2>&-'
    ended = subprocess.run(["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, timeout=60)
    assert ended.returncode == code and not list(tmp_path.iterdir())
