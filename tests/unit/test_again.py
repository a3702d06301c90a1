"""A run that is asked for more, commands that are refused, and commands whose reader has had enough."""

import json
import subprocess
import sys

import pytest

from spin_ray.config import differences, load_config, to_json
from spin_ray.errors import BadInput
from spin_ray.manifest import RunDir
from spin_ray.places import nothing_left_if_refused


def config(*overrides):
    return load_config("conf/demo.yaml", overrides)[0]


def changed(before, now):
    return differences(config(*now), json.loads(to_json(config(*before))), as_long=False)


@pytest.mark.parametrize(("before", "now"), [
    ([], ["spin.num_iterations=5"]), ([], ["spin.num_iterations=2"]),
    (["spin.lr=[1.0,2.0,3.0]"], ["spin.num_iterations=2", "spin.lr=[1.0,2.0]"]),
    (["spin.lr=[1.0,2.0,3.0]"], ["spin.num_iterations=5", "spin.lr=[1.0,2.0,3.0,9.0,9.0]"]),
    (["spin.lr=1.0"], ["spin.num_iterations=4", "spin.lr=[1.0,1.0,1.0,0.5]"]),
    (["spin.beta=[0.1,0.1,0.1]"], ["spin.num_iterations=4", "spin.beta=0.1"]),
    (["lora.rank=4", "lora.target=[q_proj,v_proj]"], ["lora.rank=4", "lora.target=[q_proj,v_proj]", "spin.num_iterations=9"]),
])
def test_more_iterations_of_the_same_are_no_other_run(before, now):
    assert changed(before, now) == []


@pytest.mark.parametrize(("before", "now", "key"), [
    ([], ["spin.num_iterations=5", "spin.beta=0.5"], "spin.beta"),
    (["spin.lr=[1.0,2.0,3.0]"], ["spin.num_iterations=4", "spin.lr=[1.0,2.0,4.0,4.0]"], "spin.lr"),
    (["spin.lr=1.0"], ["spin.num_iterations=4", "spin.lr=[1.0,1.0,0.5,0.5]"], "spin.lr"),
    (["lora.rank=4", "lora.target=[q_proj]"], ["lora.rank=4", "lora.target=[q_proj,v_proj]", "spin.num_iterations=9"], "lora.target"),
])
def test_what_the_iterations_so_far_were_made_with_may_not_change(before, now, key):
    assert [line.split(":")[0] for line in changed(before, now)] == [key]


def test_a_finished_run_is_finished_until_more_is_asked_for(tmp_path):
    where = f"run.dir={tmp_path}"
    run = RunDir.open(config(where))
    run.iteration(0).mkdir()
    run.mark("stopped", reason="enough")
    run.mark("finished")
    for asked, finished in (([], True), (["spin.num_iterations=5"], False), (["spin.num_iterations=5"], False)):
        assert RunDir.open(config(where, *asked)).finished == finished
    assert len(run.marks("extended")) == 1 and json.loads((run.path / "config.json").read_text())["spin"]["num_iterations"] == 5
    run.mark("finished")
    assert RunDir.open(config(where, "spin.num_iterations=5")).finished


def test_what_was_asked_for_by_mistake_can_be_taken_back_but_not_what_is_finished(tmp_path):
    where = f"run.dir={tmp_path}"
    run = RunDir.open(config(where))
    for t in range(2):
        run.iteration(t).mkdir()
        run.mark("iteration", iteration=t)
    for asked in (50, 3, 2, 7):
        RunDir.open(config(where, f"spin.num_iterations={asked}"))
        assert json.loads((run.path / "config.json").read_text())["spin"]["num_iterations"] == asked
    with pytest.raises(BadInput, match="2 finished iterations"):
        RunDir.open(config(where, "spin.num_iterations=1"))


def test_a_search_s_trials_are_all_as_long():
    assert differences(config("spin.num_iterations=5"), json.loads(to_json(config()))) == ["spin.num_iterations: 3 -> 5"]


@pytest.mark.parametrize("work", [None, "manifest.jsonl", "prompts", "trials"])
def test_a_refused_command_leaves_no_folder_but_never_takes_work_away(tmp_path, work):
    folder = tmp_path / "runs" / "mine"
    with pytest.raises(BadInput), nothing_left_if_refused(folder):
        (folder / "logs").mkdir(parents=True)
        (folder / "config.json").touch()
        if work:
            (folder / work).touch()
        raise BadInput("no")
    assert folder.exists() == bool(work) and (tmp_path / "runs").exists() == bool(work)


def test_a_folder_that_was_there_stays(tmp_path):
    with pytest.raises(BadInput), nothing_left_if_refused(tmp_path / "a"):
        (tmp_path / "b").touch()
        (tmp_path / "a").mkdir()
        raise BadInput("no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
    (tmp_path / "a").mkdir()
    with pytest.raises(BadInput), nothing_left_if_refused(tmp_path / "a"):
        raise BadInput("no")
    assert (tmp_path / "a").is_dir()


def test_what_another_process_has_begun_meanwhile_stays(tmp_path):
    """Two commands begin the same new run at once; the one that is refused, for whatever reason, must not take the other's folder away."""
    folder, code = tmp_path / "runs" / "mine", (
        "import sys; from pathlib import Path; from spin_ray.lock import held; from spin_ray.storage import DISK\n"
        "with held(DISK, Path(sys.argv[1]) / 'lock'): print('held', flush=True); sys.stdin.read()"
    )
    with pytest.raises(BadInput), nothing_left_if_refused(folder):
        other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "held\n"
        raise BadInput("another process is working on this run")
    assert (folder / "lock").exists()
    other.communicate()
    assert other.returncode == 0


@pytest.mark.parametrize("refused", [["model.path=no/such/folder/at/all"], ["data.train=nothing.jsonl"], ["spin.beta=-1"]])
def test_refused_runs_leave_nothing(tmp_path, refused):
    done = subprocess.run(
        [sys.executable, "-m", "spin_ray", "run", "conf/demo.yaml", f"run.dir={tmp_path}/new", *refused], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "new").exists(), done.stderr


def test_a_reader_who_has_had_enough_is_no_error():
    shell = f"{sys.executable} -m spin_ray config conf/demo.yaml | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("preset")
