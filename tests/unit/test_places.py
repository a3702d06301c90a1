"""Folders and addresses that a machine may not have: a short one for sockets, a home that can be written, a cluster that answers."""

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spin_ray import places
from spin_ray.__main__ import main
from spin_ray.address import check_ray_address
from spin_ray.errors import BadInput
from spin_ray.places import LONGEST_FOLDER, remove_short_folder, short_folder, spill_folder, stand_in_for_home

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["a", "x" * 90, "nowhere/at/all"])
def test_the_folder_for_sockets_is_short_private_and_gone_at_the_end(tmp_path, monkeypatch, name):
    wanted = tmp_path / name
    if "/" not in name:
        wanted.mkdir()
    monkeypatch.setenv("TMPDIR", str(wanted))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with short_folder() as folder:
        assert len(str(folder)) <= LONGEST_FOLDER and stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert os.environ["RAY_TMPDIR"] == os.environ["VLLM_RPC_BASE_PATH"] == str(folder)
        assert spill_folder(folder) == (str(wanted) if wanted.is_dir() else spill_folder(folder))
    assert not folder.exists() and "RAY_TMPDIR" not in os.environ


def test_a_process_that_leaves_at_once_removes_its_own_and_no_other_folder(tmp_path, monkeypatch):
    with short_folder() as folder:
        remove_short_folder()
        assert not folder.exists()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    remove_short_folder()
    assert tmp_path.exists()


def test_no_place_for_sockets_is_one_line(monkeypatch):
    monkeypatch.setattr("spin_ray.places._places", lambda: ["/proc/x", "/" + "long" * 30])
    with pytest.raises(BadInput, match=r"none of /proc/x, .* set TMPDIR to a folder of at most \d+ characters"), short_folder():
        pass


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No variable that moves a cache; what a test changes of the environment is undone."""
    for name in list(os.environ):
        if name.startswith(("XDG_", "RAY_AUTH", "TRITON_", "WANDB_CONFIG", "HF_HOME", "HF_DATASETS", "HF_MODULES")):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    yield tmp_path
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.mark.parametrize("home", ["/proc/x", "/dev/null/x"])
def test_a_home_that_cannot_be_written_has_a_private_stand_in(environment, monkeypatch, capsys, home):
    monkeypatch.setenv("HOME", home)
    stand_in_for_home()
    folder = environment / "t" / f"spin_ray-{os.getuid()}"
    assert capsys.readouterr().err == f"spin-ray: {home} cannot be written: caches and Ray's token go to {folder}\n"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    assert all(Path(os.environ[name]).is_relative_to(folder) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_CACHE_DIR"))
    first = token.read_text()
    stand_in_for_home()
    assert token.read_text() == first


def test_a_home_that_can_be_written_is_left_alone(environment, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(environment))
    before = dict(os.environ)
    stand_in_for_home()
    assert dict(os.environ) == before and not capsys.readouterr().err


def test_a_stand_in_that_another_user_made_or_a_link_is_not_taken(environment, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/x")
    (environment / "elsewhere").mkdir()
    (environment / "t" / f"spin_ray-{os.getuid()}").symlink_to(environment / "elsewhere")
    monkeypatch.setattr("spin_ray.places._places", lambda: [str(environment / "t")])
    with pytest.raises(BadInput, match="neither the home /proc/x nor any of"):
        stand_in_for_home()


@pytest.fixture
def listener():
    """A port at which something listens that is no Ray; it answers with what the test puts into `answer`."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        answer = [b"HTTP/1.0 400 Bad Request\r\n\r\n"]

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.recv(100)
                connection.sendall(answer[0])
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], answer
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("address, message", [
    ("127.0.0.1:9", "no Ray cluster answers there (Connection refused)"), ("127.0.0.1", "it has the form host:6379"),
    ("ray://127.0.0.1:9", "no Ray cluster answers there"), ("no.such.host.invalid:6379", "no Ray cluster answers there"),
    ("127.0.0.1:port", "it has the form host:6379"), ("", "it has the form host:6379"),
    ("http://127.0.0.1:8265", "that is where jobs are submitted"),
])
def test_an_address_without_a_cluster_is_one_line_at_once(address, message):
    began = time.monotonic()
    with pytest.raises(BadInput) as refused:
        check_ray_address(address, "RAY_ADDRESS")
    assert f"RAY_ADDRESS={address}: " in str(refused.value) and message in str(refused.value) and "\n" not in str(refused.value)
    assert time.monotonic() - began < 11


def test_what_speaks_something_else_is_no_cluster(listener):
    port, answer = listener
    with pytest.raises(BadInput, match="something else than a Ray cluster listens there"):
        check_ray_address(f"127.0.0.1:{port}", "RAY_ADDRESS")
    answer[0] = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    check_ray_address(f"127.0.0.1:{port}", "RAY_ADDRESS")


def test_a_head_that_wants_certificates_is_left_to_ray(monkeypatch):
    monkeypatch.setenv("RAY_USE_TLS", "1")
    check_ray_address("127.0.0.1:9", "RAY_ADDRESS")


@pytest.mark.parametrize("command", ["run", "sft", "eval"])
def test_a_cluster_that_is_gone_is_refused_before_a_row_is_read(tmp_path, command):
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    arguments = [command, str(ROOT / "conf/demo.yaml"), f"run.dir={tmp_path}/runs"]
    ended = subprocess.run([sys.executable, "-m", "spin_ray", *arguments], env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and not (tmp_path / "runs").exists()
    assert ended.stderr == (
        "spin-ray: RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there (Connection refused); start a cluster (ray start --head) and "
        "give its address, or unset it for a Ray of this run's own\n"
    )


@pytest.mark.parametrize("command", ["run", "sft", "eval"])
@pytest.mark.parametrize("folder, key", [("run.dir=/proc/x", "run.dir: /proc/x/demo"), ("run.dir=s3://b/r run.scratch=/dev/null/x", "run.scratch: /dev/null/x/")])
def test_a_run_folder_that_cannot_be_written_is_one_line(command, folder, key, capsys):
    assert main([command, str(ROOT / "conf/demo.yaml"), *folder.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"spin-ray: {key}") and "cannot be written" in said and said.count("\n") == 1


@pytest.mark.parametrize("mode, key, message", [
    ("online", None, "tracking.wandb.mode is online and there is no key; set WANDB_API_KEY"),
    ("online", "short", "API key must have 40+ characters, has 5.; set WANDB_API_KEY"), ("on", None, "WANDB_MODE=on: choose one of online"),
])
def test_wandb_online_without_a_key_is_refused_before_anything_starts(tmp_path, mode, key, message):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RAY_"))}
    env |= {"HOME": str(tmp_path), "WANDB_MODE": mode, "PYTHONPATH": str(ROOT), **({"WANDB_API_KEY": key} if key else {})}
    for command in ("run", "sft"):
        arguments = [command, str(ROOT / f"conf/demo{'_sft' if command == 'sft' else ''}.yaml"), f"run.dir={tmp_path}/runs"]
        ended = subprocess.run([sys.executable, "-m", "spin_ray", *arguments], env=env, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
        assert not (tmp_path / "runs").exists()


def test_a_build_lock_that_a_killed_process_left_is_removed_and_one_that_is_used_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left, new, used = (tmp_path / name / "lock" for name in ("left", "new", "used"))
    for lock in (left, new, used):
        lock.parent.mkdir()
        lock.touch()
    os.utime(left, (0, time.time() - 31))
    os.utime(new, (0, time.time() - 29))
    os.utime(used, (0, time.time() - 1000))
    builder = subprocess.Popen(["sleep", "2"], cwd=used.parent)
    threading.Thread(target=builder.wait).start()  # a process that nobody waits for keeps its entry
    began = time.monotonic()
    places.drop_left_build_locks()
    assert not (left.exists() or new.exists() or used.exists()) and 1 < time.monotonic() - began < 20
