"""A search of real runs: its table, picture and best config; killed, it goes on and runs nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_run import ROOT, SMALL, spin_ray

from spin_ray.config import load_config


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
    assert other.returncode == 2 and "a search that was begun otherwise" in other.stderr
