"""What the user is told when the distributed parts fail, and what they are started with."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext

import psutil
import pytest
import ray
import ray.train
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from spin_ray import system
from spin_ray.errors import BadInput, EngineFailed, RunStopped
from spin_ray.learner.group import _Trainer
from spin_ray.system import RAYS_NICENESS, Neighbours, first_error, let_learner_go_first


def wrapped(error):
    outer = RuntimeError("somewhere in Ray")
    outer.__cause__ = error
    return outer


def test_the_first_error_is_under_all_wrappings():
    for error in (BadInput("a"), EngineFailed("b"), KeyError("c")):
        assert first_error(wrapped(wrapped(error))) is error


def test_a_dead_actor_is_one_line_that_says_how_to_go_on():
    error = first_error(wrapped(ray.exceptions.ActorDiedError()))
    assert isinstance(error, RunStopped) and "\n" not in str(error) and "the same command goes on" in str(error)


def test_ray_train_starts_none_of_the_processes_that_we_do_without():
    trainer = _Trainer(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=1))
    unwanted, ours = {PlacementGroupCleanerCallback, DatasetsCallback}, set(map(type, trainer._create_default_callbacks()))
    assert unwanted <= set(map(type, super(_Trainer, trainer)._create_default_callbacks()))  # Ray still calls them so
    assert ours and not ours & unwanted


def test_all_actors_but_the_learner_s_workers_step_back():
    titles = ("ray::RayTrainWorker", "ray::Sampler.score", "ray::IDLE", "raylet")
    processes = [subprocess.Popen([title, "60"], executable=shutil.which("sleep")) for title in titles]
    try:
        let_learner_go_first()
        niceness = [os.getpriority(os.PRIO_PROCESS, process.pid) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness == [own, RAYS_NICENESS, own, own]


@pytest.mark.parametrize("busy, own, crowd", [
    (20.0, 20.0, False),  # both cores, and all of it ours
    (20.0, 14.0, True), (20.0, 0.5, True),
    (14.0, 8.0, False),  # others compute, and there is room for them
    (20.0, 16.0, False),  # less than half a core
])
def test_others_are_a_crowd_where_they_compute_and_nothing_is_left_over(monkeypatch, busy, own, crowd):
    seconds = iter([(100.0, 7.0, 3.0), (110.0, 7.0 + busy, 3.0 + own)])
    monkeypatch.setattr(Neighbours, "_seconds", staticmethod(lambda: next(seconds)))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    assert Neighbours().crowd() == crowd


def test_what_our_processes_compute_is_ours_and_an_orphan_s_is_not(tmp_path):
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 1.5: pass"]
    _, machine, own = Neighbours._seconds()
    subprocess.run(busy, check=True)
    subprocess.run([sys.executable, "-c", f"import subprocess; subprocess.run({busy!r}, check=True)"], check=True)
    _, now, ours = Neighbours._seconds()
    assert 2.9 < ours - own < 6 and now - machine > ours - own - 0.5
    done = tmp_path / "done"
    subprocess.run(["sh", "-c", f"({shlex.join(busy)}; touch {done}) &"], check=True)  # its parent is gone: nobody's
    until = time.monotonic() + 60
    while not done.exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    _, later, still = Neighbours._seconds()
    assert still - ours < 1 and later - now > 1.2


@pytest.mark.parametrize("late, starts", [(0, 1), (1, 2), (2, 3), (3, 3)])
def test_a_ray_that_does_not_come_up_in_time_is_started_again(monkeypatch, late, starts):
    seen = []

    def init(*_, **__):
        seen.append(subprocess.Popen(["sleep", "60"]))  # half a Ray
        if len(seen) <= late:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RunStopped, match="Ray did not come up in 3 attempts") if late == 3 else nullcontext():
        system._init_patiently("local")
    for process in seen[:late]:
        assert process.wait(timeout=10)
    assert len(seen) == starts and [process.poll() is None for process in seen] == [place >= late for place in range(starts)]
    for process in seen[late:]:
        process.kill()


def test_another_error_of_ray_s_start_is_not_tried_again(monkeypatch):
    seen = []
    monkeypatch.setattr(ray, "init", lambda: seen.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        system._init_patiently()
    assert seen == [1]
