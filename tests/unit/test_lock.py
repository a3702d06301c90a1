"""One process per run: who is refused and told of whom, and which dead owner is replaced."""

import dataclasses
import errno
import fcntl
import re
import subprocess
import sys
import threading
import time
import uuid

import pytest

from spin_ray import lock
from spin_ray.errors import BadInput
from spin_ray.lock import Owner, held
from spin_ray.storage import DISK, ObjectStore

OWNER = "another process is working on this run: .+@.+ \\(pid {}\\), since 20..-..-.. ..:..:.. UTC \\(\\d+ s\\), last sign of life \\d+ s ago"
HOLD = """
import sys, time
from pathlib import Path
from spin_ray import lock
from spin_ray.storage import DISK, ObjectStore
import ray
lock.BEAT_S = 0.2
ray.is_initialized = lambda: True  # as in every run: what ends the process is called from a thread of its own
url, folder = sys.argv[1:]
with lock.held(ObjectStore(url, Path(folder)) if url else DISK, Path(folder, "run", "lock")):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "disk without flock", "s3"])
def place(request, tmp_path, monkeypatch):
    """(storage, lock file) here, (URL, folder) for a process that has another scratch folder where that is possible."""
    if request.param == "s3":
        url = request.getfixturevalue("object_store") % uuid.uuid4().hex
        return ObjectStore(url, tmp_path / "here"), tmp_path / "here/run/lock", (url, tmp_path / "there")
    if request.param == "disk without flock":
        def unsupported(*_):
            raise OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(fcntl, "flock", unsupported)
    return DISK, tmp_path / "run/lock", ("", tmp_path)


@pytest.fixture
def owner(place):
    """Another process that has the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, place[2])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def of_another_machine() -> Owner:
    return dataclasses.replace(Owner.this_process(), machine="another", who="ann@far (pid 7)", since=time.time() - 7300, seen=time.time() - 190)


def test_a_second_process_is_told_of_the_first_and_takes_over_when_that_is_killed(place, owner, monkeypatch):
    storage, path, _ = place
    monkeypatch.setattr(lock, "SILENT_S", 300.0)
    with pytest.raises(BadInput, match=OWNER.format(owner.pid)) as refused, held(storage, path):
        pass
    assert "\n" not in str(refused.value)
    owner.kill()  # SIGKILL
    owner.wait()
    begun = time.monotonic()
    with held(storage, path):
        assert time.monotonic() - begun < 150  # nobody watches for signs of life where the process is known to be gone
    assert lock._owner(storage, path) is None


def test_a_run_that_ends_is_free_at_once_also_when_it_fails(place):
    storage, path, _ = place
    with pytest.raises(RuntimeError), held(storage, path):
        assert lock._owner(storage, path).who == Owner.this_process().who
        raise RuntimeError
    with held(storage, path):
        pass


def test_a_silent_owner_of_another_machine_is_replaced_and_one_that_lives_is_not(place, monkeypatch, capfd):
    storage, path, _ = place
    monkeypatch.setattr(lock, "SILENT_S", 2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    far, ended = of_another_machine(), threading.Event()
    lock._write(storage, path, far)
    with held(storage, path):
        assert lock._owner(storage, path).pid == Owner.this_process().pid
    assert re.search(r"waiting 2 s for a sign of life of ann@far \(pid 7\), since .*\(2 h\), last sign of life 3 min ago", capfd.readouterr().err)

    def live():
        while not ended.wait(0.2):
            lock._write(storage, path, dataclasses.replace(far, seen=time.time()))

    living = threading.Thread(target=live)
    lock._write(storage, path, far)
    living.start()
    try:
        with pytest.raises(BadInput, match=r"ann@far \(pid 7\), since .* \(2 h\), last sign of life [01] s ago"), held(storage, path):
            pass
    finally:
        ended.set()
        living.join()


def test_a_process_that_was_believed_dead_ends_when_it_sees_its_successor(place, owner):
    storage, path, _ = place
    lock._write(storage, path, of_another_machine())
    _, said = owner.communicate(timeout=30)
    assert owner.returncode == 1 and "silent for so long that ann@far (pid 7)" in said
    assert lock._owner(storage, path).who == "ann@far (pid 7)"  # the successor's record is left alone


def test_the_number_of_a_process_that_is_gone_may_belong_to_another():
    me = Owner.this_process()
    assert not me.is_dead() and dataclasses.replace(me, born=me.born - 1).is_dead()
    assert not dataclasses.replace(me, born=-1, machine="another").is_dead()


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "lock").write_bytes(b"\x00garbage")
    with pytest.raises(BadInput, match="lock: damaged"), held(DISK, tmp_path / "lock"):
        pass
