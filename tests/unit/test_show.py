"""`spin-ray show` on run folders of every kind: what it tells is what was written, and nothing in the folder changes."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pyarrow.fs import FileSystem, LocalFileSystem, copy_files
from seen_runs import STEP_S, config_of, half_way

from spin_ray import lock
from spin_ray.__main__ import main
from spin_ray.errors import BadInput
from spin_ray.lock import held
from spin_ray.look.progress import progress_of
from spin_ray.look.show import duration, show, told
from spin_ray.look.state import DIVERGED, FINISHED, INTERRUPTED, NEVER, RUNNING, STOPPED, facts_of, version_named
from spin_ray.look.stored import open_stored
from spin_ray.look.trials import trials_of
from spin_ray.storage import DISK, ObjectStore

HOLD = """
import sys, time
from pathlib import Path
from spin_ray import lock
from spin_ray.storage import DISK, ObjectStore
lock.BEAT_S = 0.2
if sys.argv[3] == "far":
    lock._this_machine = lambda: "another"
url, folder = sys.argv[1:3]
with lock.held(ObjectStore(url, Path(folder)) if url else DISK, Path(folder, "run", "lock")):
    print("held", flush=True)
    time.sleep(60)
"""


def seen(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """All that is in a folder, to be compared later."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in [folder, *folder.rglob("*")]}


def facts(folder: Path):
    before = seen(folder)
    found = facts_of(open_stored(str(folder)))
    assert seen(folder) == before, "show wrote into the run"
    assert told(found) and json.dumps(told(found))
    return found


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(["spin", "sft", "dpo"]), iterations=st.integers(1, 3), replay=st.integers(0, 2), epochs=st.integers(1, 2),
    data=st.data(),
)
def test_what_is_told_is_what_was_done(tmp_path_factory, method, iterations, replay, epochs, data):
    folder = tmp_path_factory.mktemp("made") / "run"
    probe = config_of(folder, method=method, iterations=iterations, replay=replay, epochs=epochs)
    total = iterations if method == "spin" else 1
    finished = data.draw(st.integers(0, total))
    run = half_way(folder, finished=finished, method=method, iterations=iterations, replay=replay, epochs=epochs)
    progress = facts(folder).progress
    assert (progress.iterations, progress.num_iterations) == (finished, total) and probe.method == method
    if finished == total:
        assert progress.step is progress.num_steps is progress.pairs is None
        return
    blocks = data.draw(st.integers(0, len(run.overlap.blocks(finished))))
    steps = data.draw(st.integers(0, run.overlap.num_steps(finished)))
    pairs = run.play(finished, blocks)
    run.train(finished, steps)
    for name in data.draw(st.sets(st.sampled_from(["manifest.jsonl", "metrics.jsonl", "timeline.jsonl", "logs/said.log"]))):
        run.append(name, data.draw(st.sampled_from(['{"stage": "iter', '{"stage": "finished"}', "{", "\0\0"])))  # being written: no line yet
    found = facts(folder)
    assert found.state == INTERRUPTED and found.progress.num_steps == run.overlap.num_steps(finished) and found.progress.step == steps
    if method == "spin":
        assert (found.progress.pairs, found.progress.num_pairs) == (pairs, sum(run.overlap.num_pairs(finished)))
    else:
        assert found.progress.pairs is found.progress.num_pairs is None
    left = progress_of(open_stored(str(folder)), since=0.0, now=run.clock).left_s
    done = run.overlap.steps_before(finished) + steps
    if done > 1:
        to_come = sum(map(run.overlap.num_steps, range(total))) - done
        assert left == pytest.approx(to_come * STEP_S), "at the pace so far"
    else:
        assert left is None


@pytest.mark.parametrize("end, state, why", [
    (lambda run: run.mark("finished"), FINISHED, ""),
    (lambda run: (run.mark("stopped", reason="nothing is\nleft"), run.mark("finished")), STOPPED, "nothing is left"),
    (lambda run: run.mark("diverged", reason="loss is nan at step 3"), DIVERGED, "loss is nan at step 3"),
    (lambda run: (run.mark("diverged", reason="loss is nan"), run.mark("rollback", iteration=0, step=3, lr_scale=0.5, error="loss is nan")),
     INTERRUPTED, "the same command goes on"),
    (lambda run: run.say("spin-ray: interrupted; the same command goes on"), INTERRUPTED, "interrupted; the same command goes on"),
    (lambda run: (run.mark("finished"), run.mark("extended", num_iterations=4)), INTERRUPTED, "the same command goes on"),
    (lambda run: (run.mark("stopped", reason="enough"), run.mark("finished"), run.mark("extended", num_iterations=4), run.mark("finished")), FINISHED, ""),
    (lambda run: run.say("0 prompts; starting"), INTERRUPTED, "the same command goes on"),
    (lambda run: None, INTERRUPTED, "the same command goes on"),
])
def test_how_a_run_ended(tmp_path, end, state, why):
    end(half_way(tmp_path / "run", finished=1, steps=2))
    found = facts(tmp_path / "run")
    assert (found.state, found.why) == (state, why) and f"{tmp_path / 'run'}: {state}" in told(found)


def test_versions_best_and_warnings(tmp_path):
    run = half_way(tmp_path / "run", finished=2)
    run.evaluate(2, nll=0.5)
    (run.folder / "best").write_text("/elsewhere/run/iter_000/model\n")
    run.mark("rollback", iteration=1, step=3, lr_scale=0.5, error="bad")
    run.log("sampler", {"num_restarts": 2})
    run.train(1, 2)
    found = facts(run.folder)
    assert found.best == "/elsewhere/run/iter_000/model" and version_named(found.best) == 1 and version_named("demo:sft") == 0
    assert found.newest == f"{run.folder}/iter_001/model" and list(found.versions) == [0, 1, 2]
    assert found.versions[2] == {"real_nll_nats_per_token": 0.5, "exact_match_t1_share": 0.5, "train_s": 10.0, "waited_s": 1.0, "loss": 0.5,
                                 "NLL term": pytest.approx(0.1), "margin": 0.25}
    assert "train_s" not in found.versions[0]
    rolled, restarted, again = found.warnings
    assert "iteration 1, step 3: bad; 0.5 times" in rolled and "anew 2 times" in restarted and "again 1 times" in again


def test_folders_in_which_nothing_has_begun(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert facts(tmp_path / "empty").state == NEVER
    (tmp_path / "tried/logs").mkdir(parents=True)
    assert facts(tmp_path / "tried").state == NEVER
    half = half_way(tmp_path / "run", finished=0).folder
    (half / "manifest.jsonl").unlink()
    assert facts(half).state == NEVER


@pytest.mark.parametrize("files, line", [
    ({"notes.txt": ""}, "no run's folder: there is no config.json in it"), ({"config.json": '{"architectures": []}'}, "is a model's: spin-ray chat"),
    ({"config.json": "[1]"}, "no run's folder"), ({"config.json": '{"run": '}, "damaged"), (None, "no such folder"),
])
def test_what_is_no_run_is_one_line(tmp_path, capsys, files, line):
    folder = tmp_path / "x"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert main(["show", str(folder)]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize("where", ["near", "far", "far, on an object store"])
def test_running_is_what_the_lock_says(tmp_path, request, monkeypatch, where):
    half_way(tmp_path / "run", finished=1)
    url, storage, path = "", DISK, tmp_path / "run/lock"
    if "store" in where:
        url = request.getfixturevalue("object_store") % uuid.uuid4().hex
        storage, path = ObjectStore(url, tmp_path / "here"), tmp_path / "here/run/lock"
    words = [sys.executable, "-c", HOLD, url, str(tmp_path), "far" if "far" in where else "near"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        owner, at_work = lock.seen_at_work(storage, path, patience_s=20)
        assert at_work and f"(pid {process.pid})" in str(owner)
        if not url:
            found = facts_of(open_stored(str(tmp_path / "run")))
            assert found.state == RUNNING and f"pid {process.pid}" in found.why and "left" in told(found)
    finally:
        process.kill()
        process.communicate()
    owner, at_work = lock.seen_at_work(storage, path, patience_s=2)
    assert owner and not at_work
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    with held(storage, path):  # nobody was kept out by those who looked
        pass
    assert lock.seen_at_work(storage, path) == (None, False)


def test_from_an_object_store_as_from_a_disk(tmp_path, object_store):
    run = half_way(tmp_path / "run", finished=2, blocks=2, steps=1)
    run.say("hello")
    url = object_store % uuid.uuid4().hex
    store, base = FileSystem.from_uri(url)
    copy_files(str(run.folder), f"{base}/run", source_filesystem=LocalFileSystem(), destination_filesystem=store)
    base_url, _, query = url.partition("?")
    far = facts_of(open_stored(f"{base_url}/run?{query}"))
    near = facts_of(open_stored(str(run.folder)))
    assert far.run == f"{base_url}/run" and far.progress == near.progress and far.versions == near.versions and far.said == near.said
    for wrong in (f"{base_url}/nothing?{query}", "s3://run", "nonsense://x/y"):
        with pytest.raises(BadInput):
            facts_of(open_stored(wrong))


def test_one_fact_and_json(tmp_path, capsys):
    run = half_way(tmp_path / "run", finished=1, steps=1)
    run.log("train", {"loss": float("nan"), "global_step": 99}, iteration=1, step=1)
    assert main(["show", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["state"] == INTERRUPTED and found["progress"]["iterations"] == 1 and found["training"]["loss"] is None
    assert main(["show", str(run.folder), "progress.iterations"]) == 0 and capsys.readouterr().out == "1\n"
    assert main(["show", str(run.folder), "stat"]) == 2 and "did you mean state?" in capsys.readouterr().err


def test_what_a_run_says_does_not_act_on_the_terminal(tmp_path):
    run = half_way(tmp_path / "run", finished=1)
    run.say("\x1b]0;owned\x07 [bold]x[/bold] \u202eabc")
    run.mark("diverged", reason="\x1b[2J gone")
    text = told(facts(run.folder))
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text and "[bold]x[/bold]" in text


def test_follow_ends_with_the_run(tmp_path, capsys, monkeypatch):
    run = half_way(tmp_path / "run", finished=1)
    monkeypatch.setattr("spin_ray.look.show.REDRAW_S", 0.05)
    ready, over = threading.Event(), threading.Event()

    def work() -> None:
        with held(DISK, run.folder / "lock"):
            ready.set()
            time.sleep(0.5)
            run.mark("finished")
        over.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    show(str(run.folder), "", follow=True, as_json=True)
    thread.join()
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert set(states[:-1]) == {RUNNING} and states[-1] == FINISHED


def test_sessions_are_added_without_the_time_between(tmp_path):
    run = half_way(tmp_path / "run", finished=0)
    for session, begin in ((0, 1000.0), (1, 5000.0)):
        span = {"session": session, "player": "main player", "activity": "train", "iteration": 0, "begin": begin, "end": begin + 60}
        run.append("timeline.jsonl", json.dumps(span) + "\n")
    (run.folder / "metrics.jsonl").unlink()
    progress = facts(run.folder).progress
    assert progress.begun == 1000.0 and progress.worked_s == 120.0
    for started in (990.0, 4980.0):
        run.mark("session", started=started)
    found = facts(run.folder)
    assert found.progress.begun == 990.0 and found.progress.worked_s == 150.0 and "went on 1 times" in found.warnings[0]


@pytest.mark.parametrize("seconds, words", [(59.6, "60 s"), (120, "2 min"), (4020, "67 min"), (7500, "2 h 5 min"), (200_000, "2 d 8 h")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_search_is_a_table(tmp_path, capsys):
    folder = tmp_path / "tune"
    folder.mkdir()
    (folder / "search.json").write_text("{}")
    assert trials_of(folder).rows == []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="tune", storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))))
    for state in ("finished", "refused", None):
        trial = study.ask({"spin.lr": optuna.distributions.FloatDistribution(1e-5, 1e-3)})
        if state:
            trial.set_user_attr("state", state)
            trial.set_user_attr("minutes", 2.0)
            study.tell(trial, 1.0)
        if state != "refused":
            half_way(folder / f"trials/trial_{trial.number:03d}", finished=1)
    before = seen(folder)
    assert main(["show", str(folder)]) == 0
    assert seen(folder) == before
    out = capsys.readouterr().out.splitlines()
    assert "a search, not running" in out[0] and out[1].split()[:3] == ["trial", "spin.lr", "state"]
    assert [line.split()[2] for line in out[2:5]] == ["finished", "refused", INTERRUPTED] and "1/3" in out[2]


def test_a_study_is_a_table(capsys):
    assert main(["show", str(Path(__file__).parents[2] / "docs/study")]) == 0
    assert "a study's finished runs" in capsys.readouterr().out


def test_show_loads_neither_torch_nor_ray(tmp_path):
    run = half_way(tmp_path / "run", finished=1)
    code = f"import sys; from spin_ray.__main__ import main; main(['show', {str(run.folder)!r}]); sys.exit(bool({{'torch', 'ray'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True).returncode == 0
