"""The study's bookkeeping with made-up runs: rates searched past the edges, nothing run twice, tables and pictures from the lines."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spin_ray.config import load_config
from spin_ray.errors import BadInput, RunStopped
from spin_ray.interrupt import Interrupted
from spin_ray.manifest import RunDir
from spin_ray.study import trials
from spin_ray.study.arms import ARMS, PARTS, RATES, Arm, Part
from spin_ray.study.lines import Line, Lines, Trial, refuse_other_config
from spin_ray.study.made import make_data
from spin_ray.study.report import report
from spin_ray.study.study import Size, Study, run_study
from spin_ray.study.trials import Outcome, side_by_side

CURVE = Arm("tuned", "an arm", ("spin.num_iterations=2",))
TAKER = Arm("taker", "another", ("spin.num_iterations=1",), rate_of="tuned")
GRID = Arm("grid", "a grid", ("spin.num_iterations=1",), rate="", points=(("spin.lr=0.001",), ("spin.lr=0.01",)))
MADE = {arm.name: arm for arm in (CURVE, TAKER, GRID)}


class Runs:
    """Plays a run by writing its manifest: the more right answers the nearer its rate is to `best`, none above `collapses`."""

    def __init__(self, best=3e-4, collapses=1.0, code=0):
        self.best, self.collapses, self.code, self.played = best, collapses, code, []

    def __call__(self, config, overrides, log, command="run"):
        config, _ = load_config(config, overrides)
        self.played.append(config)
        run = RunDir(config.run_path)
        run.path.mkdir(parents=True)
        rate = config.spin.lr
        for version in range(config.spin.num_iterations + 1):
            right = 0.4 + version * (0.1 - abs(RATES.index(rate) - RATES.index(self.best)) / 100 + config.run.seed / 1000)
            if version and rate > self.collapses:
                right = 0.0
            run.mark("evaluation", version=version, metrics={"exact_match_t1_share": right, "real_nll_nats_per_token": 0.5})
            if version:
                run.mark("iteration", iteration=version - 1, report={"num_steps": 50 * version, "num_pairs": 9, "num_tokens": 99, "wall_s": 6.0})
        return Outcome(self.code, "a line", run.evaluations(), 60.0)


def study(tmp_path, play, *settings, size=None):
    return Study(Lines(tmp_path / "runs.jsonl"), tmp_path / "study", settings, size or Size(), MADE, play, measure)


def measure(arm, run, version):
    return {"right_probability": run.evaluations()[version]["exact_match_t1_share"]}


@pytest.mark.parametrize("best, tried", [(3e-4, 3), (1e-3, 4), (1e-5, 5), (1e-2, 5)])
def test_a_search_goes_on_past_an_end_that_is_the_best(tmp_path, best, tried):
    runs = Runs(best)
    made = study(tmp_path, runs)
    made.run(Part("a", "?", ("tuned", "taker")))
    searches = [config for config in runs.played if str(config.data.eval).endswith("search.jsonl")]
    assert len(searches) == tried and len(runs.played) == tried + 6
    finals = [config for config in runs.played if config not in searches]
    assert {config.spin.lr for config in finals} == {best} and [config.run.seed for config in finals] == [0, 1, 2, 0, 1, 2]
    assert all(config.data.eval == "demo:heldout" for config in finals)
    assert not list((tmp_path / "study/runs").iterdir())  # what has a line needs no folder


def test_what_has_a_line_is_not_run_again_and_other_settings_are_other_runs(tmp_path):
    part = Part("a", "?", ("tuned", "grid"))
    study(tmp_path, Runs()).run(part)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"arm": "tuned", "st')  # killed while it wrote
    again, other = Runs(), Runs()
    study(tmp_path, again).run(part)
    assert not again.played
    study(tmp_path, again, size=Size(seeds=4)).run(part)
    assert [config.run.seed for config in again.played] == [3, 3, 3]
    study(tmp_path, other, "data.max_prompts=100").run(part)
    assert len(other.played) == 12 and all(config.data.max_prompts == 100 for config in other.played)
    assert all(json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines())


def test_what_changes_no_result_may_change_from_one_session_to_the_next(tmp_path):
    part, again = Part("a", "?", ("tuned", "grid")), Runs()
    study(tmp_path, Runs(), "spin.beta=0.2").run(part)
    made = study(tmp_path, again, "learner.pack_tokens=4096", "spin.beta=0.2", f"run.dir={tmp_path}")
    made.run(part)
    assert not again.played and made.counted == ("spin.beta=0.2",)
    assert "0.0003" in report(part, MADE, made.lines, tmp_path, made.counted)


def test_a_config_file_that_has_changed_since_is_refused(tmp_path):
    file, kept = tmp_path / "mine.yaml", tmp_path / "configs.json"
    text = "model: {path: demo:sft}\ndata: {train: demo:train}\n"
    file.write_text(text)
    refuse_other_config(kept, str(file))
    file.write_text(text + "spin: {beta: 0.1}\nrun: {dir: elsewhere}\n")  # what it was, and where
    refuse_other_config(kept, str(file))
    before = json.loads(kept.read_text())
    del before[str(file)]["spin.loss"]  # the key is younger than the study
    kept.write_text(json.dumps(before))
    refuse_other_config(kept, str(file))
    assert json.loads(kept.read_text())[str(file)]["spin.loss"] == "logistic"
    file.write_text(text + "spin: {beta: 0.3}\n")
    with pytest.raises(BadInput, match=r"mine\.yaml: spin\.beta was 0\.1 and is 0\.3 since .*runs\.jsonl was begun"):
        refuse_other_config(kept, str(file))


def test_a_judged_part_needs_its_encoder_before_the_first_run(tmp_path):
    with pytest.raises(BadInput, match=r"minilm: no such folder; .*spin_ray\.demo\.real. makes it"):
        run_study(["real", f"run.dir={tmp_path}", f"data.eval={tmp_path}/heldout.jsonl"], tmp_path / "out", Size())


def test_a_rate_that_collapses_is_not_the_best(tmp_path):
    runs = Runs(best=1e-2, collapses=2e-4)
    study(tmp_path, runs, size=Size(seeds=1)).run(Part("a", "?", ("tuned",)))
    assert runs.played[-1].spin.lr == 1e-4
    assert [line.state for line in Lines(tmp_path / "runs.jsonl")] == ["finished", "collapsed", "collapsed", "finished", "finished"]


def test_arms_side_by_side_find_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    part = Part("a", "?", ("taker", "tuned", "grid"))
    study(one, Runs()).run(part), study(two, Runs(), size=Size(concurrent=3)).run(part)
    assert {line.trial for line in Lines(one / "runs.jsonl")} == {line.trial for line in Lines(two / "runs.jsonl")}


@pytest.mark.parametrize("code, error", [(130, Interrupted), (2, BadInput), (1, RunStopped)])
def test_a_run_that_did_not_end_has_no_line(tmp_path, code, error):
    with pytest.raises(error):
        study(tmp_path, Runs(code=code)).run(Part("a", "?", ("grid",)))
    assert not list(Lines(tmp_path / "runs.jsonl"))


@pytest.mark.parametrize("concurrent", [1, 2])
def test_after_a_failure_nothing_more_is_begun(concurrent):
    begun, together = [], threading.Barrier(concurrent)

    def work(item):
        begun.append(item)
        together.wait(10)
        time.sleep(0.1 * item)  # so that the first one's failure is the first
        raise RunStopped(f"{item} failed")

    with pytest.raises(RunStopped, match="0 failed"):
        side_by_side(work, range(50), concurrent)
    assert len(begun) == concurrent


def test_an_arm_that_fails_ends_the_others_between_two_runs(tmp_path):
    failed, runs = threading.Event(), Runs()

    def play(config, overrides, log, command="run"):
        if "spin.lr=0.001" in overrides and not failed.is_set():
            time.sleep(0.05)
            failed.set()
            return Outcome(1, "out of memory", {}, 1.0)
        failed.wait(10)
        time.sleep(0.2)
        return runs(config, overrides, log)

    arms = {"bad": GRID, "good": Arm("good", "", ("spin.num_iterations=1",), rate="", points=(("spin.lr=0.0001",),))}
    made = Study(Lines(tmp_path / "runs.jsonl"), tmp_path / "study", (), Size(seeds=5, concurrent=2), arms, play, measure)
    with pytest.raises(RunStopped, match="out of memory"):
        made.run(Part("a", "?", ("good", "bad")))
    assert len(runs.played) == 1  # what ran when the other failed has its line
    assert [line.arm for line in Lines(tmp_path / "runs.jsonl")] == ["good"]


def test_an_error_while_a_run_is_watched_ends_the_run(tmp_path, monkeypatch):
    begun = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **options: begun.append(popen([sys.executable, "-c", "import time; time.sleep(600)"])) or begun[0])
    run = RunDir(tmp_path / "demo")
    run.path.mkdir()
    run.mark("evaluation", version=0, metrics={})
    with pytest.raises(KeyError):
        trials.play("conf/demo.yaml", [f"run.dir={tmp_path}"], tmp_path / "log", lambda version, metrics, run: metrics["no such"])
    assert begun[0].poll() is not None


def test_a_sigterm_reaches_the_runs_and_ends_the_study():
    script = (
        "import subprocess, sys, spin_ray.study.trials as t\n"
        "def work(_):\n    p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n    t._RUNNING.add(p)\n    print('begun', flush=True)\n"
        "    print('ended', p.wait(), flush=True)\n"
        "try:\n    t.side_by_side(work, range(3), 1)\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=120)[0] == "ended -15\ninterrupted\n" and process.returncode == 0


def test_tables_and_pictures_come_from_the_lines(tmp_path):
    out, lines = tmp_path / "docs/study", Lines(tmp_path / "runs.jsonl")
    out.mkdir(parents=True)
    (tmp_path / "docs/study.md").write_text("# Mine\n<!-- b -->\nold\n<!-- end of b -->\nafter\n")
    runs = Runs(collapses=5e-3)
    made = Study(lines, tmp_path / "study", (), Size(seeds=2), MADE, runs, measure)
    curve, grid = Part("a", "Which?", ("tuned", "taker")), Part("b", "Where?", ("grid",), kind="grid")
    made.run(curve), made.run(grid)
    table = report(curve, MADE, lines, out, ()).splitlines()
    assert table[0] == "|  | lr | steps | right at T=1 | NLL of y | training, min | seeds |"
    assert table[2].startswith("| theta_0 |  | 0 | 0.400 ± 0.000 |")
    assert table[3:6] == [
        "| an arm, theta_1 | 0.0003 | 50 | 0.500 ± 0.001 | 0.500 ± 0.000 | 0.1 | 2 |",
        "| an arm, theta_2 | 0.0003 | 150 | 0.601 ± 0.001 | 0.500 ± 0.000 | 0.2 | 2 |",
        "| another | 0.0003 | 50 | 0.500 ± 0.001 | 0.500 ± 0.000 | 0.1 | 2 |",
    ]
    table = report(grid, MADE, lines, out, ()).splitlines()
    assert table[0] == "| right at T=1 (theta_0: 0.400 ± 0.000) | lr 0.001 | lr 0.01 |"
    assert table[2] == "| a grid | 0.491 ± 0.001; NLL +0.00 | 0.000 ± 0.000; NLL +0.00; **collapsed 2/2** |"
    document = (tmp_path / "docs/study.md").read_text()
    assert document.startswith("# Mine\n<!-- b -->\n| right") and "old" not in document and "after\n\n## Which?\n<!-- a -->\n" in document
    assert "](study/a.png)" in document and all((out / f"{name}.png").stat().st_size > 5000 for name in "ab")
    report(grid, MADE, lines, out, ())
    assert (tmp_path / "docs/study.md").read_text() == document


def test_a_part_without_runs_has_an_empty_table(tmp_path):
    for part in (Part("a", "?", ("tuned",)), Part("b", "?", ("grid",), kind="grid")):
        assert report(part, MADE, Lines(tmp_path / "none.jsonl"), tmp_path, ())


def test_every_arm_is_a_config_that_runs_and_every_part_has_arms():
    for arm in ARMS.values():
        for settings in (arm.settings, (*arm.settings, *arm.searched_with), *((*arm.settings, *point) for point in arm.points)):
            load_config(arm.config, settings)
        assert not arm.rate_of or ARMS[arm.rate_of].rate == arm.rate or {arm.rate, ARMS[arm.rate_of].rate} <= {"spin.lr", "sft.lr", "dpo.lr"}
    assert {name for part in PARTS.values() for name in part.arms} == set(ARMS)


def test_arms_that_are_compared_take_equal_steps():
    def steps(name):
        config, _ = load_config(ARMS[name].config, ARMS[name].settings)
        epochs = {"sft": config.sft, "dpo": config.dpo}[config.method].num_epochs
        return config.num_steps(config.data.max_prompts, epochs)

    assert [steps(f"sft_{n}") for n in (1, 3, 5, 7, 11)] == [50, 150, 250, 350, 550]
    assert [steps(name) for name in ("dpo_400", "dpo_1600", "dpo_6400", "sft_6400")] == [350] * 4


def test_its_data_has_no_instruction_twice(tmp_path):
    files = make_data(tmp_path)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    searched = [row["messages"][0]["content"] for row in rows["search"]]
    asked = [row["prompt"] for row in rows["preferences"]]
    shipped = [json.loads(line)["messages"][0]["content"] for name in ("train", "heldout") for line in (Path("spin_ray/demo") / f"{name}.jsonl").read_text().splitlines()]
    assert len(searched) == 500 and len(asked) == 6400 and len({*searched, *asked, *shipped}) == 500 + 6400 + len(set(shipped))
    assert all(row["chosen"] != row["rejected"] for row in rows["preferences"])
    before = {name: path.stat().st_mtime_ns for name, path in files.items()}
    assert before == {name: path.stat().st_mtime_ns for name, path in make_data(tmp_path).items()}


def test_a_probe_stands_beside_the_runs_that_it_forecasts(tmp_path):
    arms = {**MADE, "probe": Arm("probe", "a probe", ("spin.num_iterations=1",), rate="", forecasts="grid")}
    runs, probed = Runs(collapses=5e-3), []

    def play(config, overrides, log, command="run"):
        if command == "run":
            return runs(config, overrides, log)
        probed.append(config)
        folder = tmp_path / "study/runs/probe-probe"
        folder.mkdir(parents=True)
        tries = [{"lr": lr, "beta": 0.1, "verdict": verdict, "nll_change_nats_per_token": lr} for lr, verdict in ((9e-4, "learns"), (9e-3, "collapses"))]
        (folder / "probe.json").write_text(json.dumps({"tries": tries}))
        return Outcome(0, "", {}, 30.0)

    made = Study(Lines(tmp_path / "runs.jsonl"), tmp_path / "study", (), Size(seeds=1), arms, play, measure)
    part = Part("c", "Right?", ("probe",), kind="forecast")
    made.run(Part("b", "?", ("grid",), kind="grid")), made.run(part), made.run(part)
    assert len(probed) == 1 and not list((tmp_path / "study/runs").iterdir())
    (tmp_path / "docs").mkdir()
    table = report(part, arms, Lines(tmp_path / "runs.jsonl"), tmp_path / "docs/study", ())
    assert table.splitlines()[2:] == [
        "| a grid | lr 0.001 | learns (lr 0.0009, beta 0.1) | +0.00 | 0.490; NLL +0.00 |",
        "| a grid | lr 0.01 | collapses (lr 0.009, beta 0.1) | +0.01 | 0.000; NLL +0.00; **collapsed 1/1** |",
    ]
    assert "## Right?" in (tmp_path / "docs/study.md").read_text()


def test_words_that_are_no_part_and_lines_that_are_none(tmp_path):
    with pytest.raises(BadInput, match="magic: no part of the study; its parts are sft, epochs"):
        run_study(["magic"], tmp_path, Size())
    for size in (Size(seeds=0), Size(concurrent=0)):
        with pytest.raises(BadInput, match=" 0: must be at least 1"):
            run_study(["replay"], tmp_path, size)
    with pytest.raises(BadInput, match="a study lies on a disk"):
        run_study(["replay", "run.dir=s3://bucket/runs"], tmp_path, Size())
    (tmp_path / "runs.jsonl").write_text('{"arm": "spin"}\n')
    with pytest.raises(BadInput, match=r"runs\.jsonl:1: no line of a study"):
        Lines(tmp_path / "runs.jsonl")


def test_a_line_comes_back_as_it_was(tmp_path):
    line = Line("a", "final", ("spin.lr=0.1",), 1, "finished", 1.5, {0: {"x": 0.25}, 1: {"x": 0.5}}, ({"num_steps": 5}, {"num_steps": 7}))
    Lines(tmp_path / "a.jsonl").add(line)
    [back] = Lines(tmp_path / "a.jsonl")
    assert back == line and back.trial == Trial("a", "final", ("spin.lr=0.1",), 1) and [back.steps(v) for v in (0, 1, 2)] == [0, 5, 12]
