"""A real run looked at while it goes on and when it is over, talked to, and a doctor's full visit. Real Ray, vLLM, DeepSpeed."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_run import ROOT, SMALL, snapshot, spin_ray
from transformers import AutoModelForCausalLM

from spin_ray.config import load_config
from spin_ray.model import inspect_model

RAY = Path(sys.executable).parent / "ray"
QUESTIONS = ["Count the tools: mouse, knife, grey, axe, file?", "Read this list from the end: yellow, fig, saw."]


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A finished run, and what `show --json --follow` said of it from its begin to its end."""
    runs = tmp_path_factory.mktemp("runs")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    (runs / "seen").mkdir()
    words = [sys.executable, "-m", "spin_ray"]
    command = [*words, "run", "conf/demo.yaml", f"run.dir={runs}", "run.name=seen", *SMALL]
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    follow = subprocess.Popen([*words, "show", str(runs / "seen"), "--json", "--follow"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = run.communicate(timeout=900)
        assert run.returncode == 0, said[-3000:]
        told, _ = follow.communicate(timeout=60)  # it ends with the run
        assert follow.returncode == 0
    finally:
        for process in (run, follow):
            process.kill()
    return runs / "seen", [json.loads(line) for line in told.splitlines()]


def test_a_run_is_seen_from_its_begin_to_its_end(looked_at):
    run, told = looked_at
    states = [facts["state"] for facts in told]
    assert "running" in states and states[-1] == "finished" and set(states) <= {"never started", "running", "finished"}
    done = [facts["progress"]["iterations"] for facts in told]
    assert done == sorted(done) and done[-1] == 2
    assert re.search(r"@.+ \(pid \d+\), since ", next(facts for facts in told if facts["state"] == "running")["why"])
    last = told[-1]
    assert list(last["versions"]) == ["0", "1", "2"] and "real_nll_nats_per_token" in last["versions"]["2"]
    before = snapshot(run)
    shown = spin_ray("show", run)
    assert shown.returncode == 0 and shown.stdout.startswith(f"{run}: finished") and "theta_2" in shown.stdout
    assert "finished: the model is" in shown.stdout  # which is said when all is shut down, so `--follow` may have ended before
    assert snapshot(run) == before


def test_the_models_of_a_run_answer_as_transformers_says(looked_at):
    run, _ = looked_at
    before = snapshot(run)
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    chat = [sys.executable, "-m", "spin_ray", "chat", str(run), "--compare", "--iteration", "2", "--max-new-tokens", "24"]
    asked = subprocess.run(chat, cwd=ROOT, env=env, input=f"{QUESTIONS[0]}\n/reset\n{QUESTIONS[1]}\n", capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    expected = []
    for text in QUESTIONS:
        for name, folder in (("theta_0", "demo:sft"), ("theta_2", str(run / "iter_001/model"))):
            facts = inspect_model(load_config(ROOT / "conf/demo.yaml", [f"model.path={folder}"])[0])
            lm = AutoModelForCausalLM.from_pretrained(facts.path, dtype=torch.float32)
            prompt = torch.tensor([facts.chat.encode([{"role": "user", "content": text}], "yes")[0]])
            ends = sorted(facts.chat.stop_ids)
            ids = lm.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=0)
            expected.append(f"{name}: {facts.chat.decode(ids[0, prompt.shape[1]:].tolist())}")
    assert asked.stdout.splitlines() == expected
    assert snapshot(run) == before


def test_a_doctor_s_full_visit(tmp_path):
    visit = spin_ray("doctor", "conf/demo.yaml", f"run.dir={tmp_path}/runs", "--json")
    told = json.loads(visit.stdout)
    found = {line["check"]: line for line in told["checks"]}
    assert visit.returncode == 0 and told["ok"], told
    assert "a task on" in found["ray"]["what"] and "'There are three.' on a" in found["vllm"]["what"] and "steps on a" in found["deepspeed"]["what"]
    first, second = map(float, re.findall(r"loss ([\d.]+), then ([\d.]+)", found["deepspeed"]["what"])[0])
    assert first == pytest.approx(0.6931, abs=1e-3) and second < first  # policy == opponent at the first step
    assert "demo/sft" in found["model"]["what"] and "kept 64" in found["data"]["what"] and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_doctor_of_a_cluster(tmp_path):
    """The nodes of RAY_ADDRESS, and a head that is gone."""
    log = tmp_path / "head.log"
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "TMPDIR": "/tmp"}
    with log.open("w") as output:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=false"], env=env, stdout=output, stderr=output
        )
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.2)
        address = re.search(r"--address='([\d.:]+)'", log.read_text())[1]
        answer = tmp_path / "nodes.json"
        words = [sys.executable, "-m", "spin_ray.look.apart", "nodes", str(answer), str(tmp_path)]
        subprocess.run(words, cwd=ROOT, env={**env, "RAY_ADDRESS": address}, timeout=180, check=True, capture_output=True)
        [node] = json.loads(answer.read_text())
        assert node["state"] == "ok" and "2 CPU, 0 GPU" in node["what"]
        assert abs(float(re.search(r"clock ([+-][\d.]+) s", node["what"])[1])) < 0.5
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.terminate()
        head.wait(timeout=60)
    gone = subprocess.run(words, cwd=ROOT, env={**env, "RAY_ADDRESS": address}, timeout=60, capture_output=True)
    [found] = json.loads(answer.read_text())
    assert gone.returncode == 0 and found["state"] == "error" and address in found["what"]
