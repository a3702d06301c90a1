"""A new user's path through the documents, every command shortened: look before, run, look after. Real parts, the demo's model and data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = [
    "data.max_prompts=48", "data.max_eval_prompts=16", "spin.num_iterations=1", "sampler.block_prompts=16", "learner.batch_pairs=16",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("new_user")


def spin_ray(*words, **options):
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-m", "spin_ray", *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done


def test_doctor_plan_probe_run_show_report_chat_eval(runs):
    keys = [f"run.dir={runs}", *SHORT]
    found = json.loads(spin_ray("doctor", "conf/demo.yaml", f"run.dir={runs}", "--json").stdout)
    assert not [one for one in found["checks"] if one["state"] == "error"] and not list(runs.iterdir())
    plan = spin_ray("plan", "conf/demo.yaml", *keys).stdout
    assert "GiB" in plan and not list(runs.iterdir())
    probe = spin_ray("probe", "conf/demo.yaml", *keys).stdout
    assert "Which settings are safe?" in probe and "What does an iteration cost?" in probe
    run = spin_ray("run", "conf/demo.yaml", *keys).stdout
    assert "finished: the model is" in run
    shown = spin_ray("show", runs / "demo").stdout
    assert "finished" in shown and "theta_1" in shown
    page = Path(spin_ray("report", runs / "demo").stdout.strip())
    assert page == runs / "demo/report.html" and "theta_1" in page.read_text()
    for more in ([], ["--compare"], ["--iteration", "0"]):
        said = spin_ray("chat", runs / "demo", *more, input="Which of these are tools: hammer, spade, apple?\n").stdout
        assert "hammer" in said
    numbers = json.loads(spin_ray("eval", "conf/demo.yaml", *keys, "run.name=eval", f"model.path={runs}/demo/iter_000/model").stdout)
    assert numbers["num_prompts"] == 16
