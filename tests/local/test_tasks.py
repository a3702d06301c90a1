"""Tasks of lm-evaluation-harness over real samplers: the numbers, and each single answer, are those of the harness' own back end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from made_tasks import make_tasks

from spin_ray.config import load_config
from spin_ray.model import inspect_model
from spin_ray.records import Version
from spin_ray.sampler.pool import start_opponent
from spin_ray.system import ray_cluster
from spin_ray.tasks.asking import PoolAnswers
from spin_ray.tasks.harness import load_tasks
from spin_ray.tasks.model import SamplerModel
from spin_ray.tasks.numbers import in_words

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def facts():
    return inspect_model(load_config(ROOT / "conf/demo.yaml")[0])


@pytest.fixture(scope="module")
def pool(facts, tmp_path_factory):
    """Two real replicas of the demo's model in a real pool."""
    logs = tmp_path_factory.mktemp("logs")
    config, _ = load_config(ROOT / "conf/demo.yaml", ["sampler.num_replicas=2"])
    with ray_cluster(config, learner=False) as hardware:
        pool, _ = start_opponent(config, facts.saved, 0, hardware, max_model_len=256, logs=logs, reloads=False)
        pool.release.remote(Version(0))
        yield pool


def wanted(folder: Path, *overrides: str):
    return load_config(ROOT / "conf/demo.yaml", [f"eval.include_path={folder}", *overrides])[0].eval


def own_back_end(facts, max_length: int | None = None) -> HFLM:
    """One text at a time: in a batch the harness lets an answer run on until all of them have ended."""
    return HFLM(pretrained=facts.path, dtype=torch.float32, device="cpu", batch_size=1, max_length=max_length)


# Every kind of request; with examples before the question; in the chat template; and longer than what can be read.
@pytest.mark.parametrize("shots, chat, max_length", [(None, False, None), (2, False, None), (1, True, None), (3, False, 40)])
def test_numbers_are_those_of_the_harness_own_back_end(pool, facts, folder, monkeypatch, shots, chat, max_length):
    monkeypatch.chdir(folder)  # where the harness itself looks for data files
    names = ["made", "made_texts"]
    given = [f"eval.tasks=[{','.join(names)}]", f"eval.chat_template={chat}", f"eval.num_fewshot={'null' if shots is None else shots}"]
    said = []
    tasks = load_tasks(wanted(folder, *given, f"eval.max_length={max_length or 'null'}"), facts, said.append)
    ours = tasks.evaluate(pool, Version(0))
    theirs = simple_evaluate(
        model=own_back_end(facts, tasks.max_length), tasks=names, num_fewshot=shots, apply_chat_template=chat, bootstrap_iters=10,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), log_samples=False,
    )
    expected = in_words(theirs["results"])
    assert ours.tasks.keys() == expected.keys() == {"made", "made_choice", "made_answers", "made_texts"}
    for task, numbers in ours.tasks.items():
        assert numbers == pytest.approx(expected[task], abs=1e-4, rel=1e-4), task
    assert {"acc", "acc_se", "acc_norm", "acc_norm_se", "num_docs"} <= ours.tasks["made_choice"].keys()
    assert 0 < ours.tasks["made_choice"]["acc"] < 1 and ours.tasks["made_choice"]["num_docs"] == 24
    assert bool(max_length) == bool(ours.num_truncated) == bool(ours.num_windowed) == any("their begin is cut off" in text for text in said)


def test_every_answer_is_that_of_the_harness_own_back_end(pool, facts, folder):
    tasks = load_tasks(wanted(folder, f"eval.tasks=[{folder}]"), facts, print)
    theirs, ours = own_back_end(facts), SamplerModel(facts.chat, tasks.max_length, PoolAnswers(pool, Version(0)))
    asked = {kind: [each for each in tasks._instances() if each.request_type == kind] for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until")}
    expected, found = (model.loglikelihood(asked["loglikelihood"]) for model in (theirs, ours))
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] and len({greedy for _, greedy in found}) == 2
    again = ours.loglikelihood(asked["loglikelihood"])  # all of them are in the prefix cache
    assert [logp for logp, _ in again] == pytest.approx([logp for logp, _ in found], abs=1e-4)
    assert [greedy for _, greedy in again] == [greedy for _, greedy in found]
    expected, found = (model.loglikelihood_rolling(asked["loglikelihood_rolling"]) for model in (theirs, ours))
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)
    expected, found = (model.generate_until(asked["generate_until"]) for model in (theirs, ours))
    assert found == expected and len(set(found)) > 3


def spin_ray(*arguments: object) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "spin_ray", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)


def records(path: Path, key: str) -> list[dict]:
    return [record for record in map(json.loads, path.read_text().splitlines()) if any(name.startswith(key) for name in record)]


def test_a_run_asks_every_version_once(folder, tmp_path):
    run = tmp_path / "run"
    command = [
        "run", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=run", "data.eval=", "data.max_prompts=32", "spin.num_iterations=2",
        "sampler.block_prompts=16", "learner.batch_pairs=16", f"eval.tasks=[{folder / 'choice.yaml'}:1]", "eval.limit=8",
    ]
    done = spin_ray(*command)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    for noise in ("WARNING", "INFO", "it/s", "examples/s", "lm_eval"):
        assert noise not in done.stdout + done.stderr, f"{noise} on the user's terminal"
    assert "SFT: made_choice acc 0." in done.stdout and "theta_2: made_choice acc" in done.stdout
    logged = records(run / "metrics.jsonl", "tasks/")
    assert [record["opponent_version"] for record in logged] == [0, 1, 2]
    assert all(record["tasks/made_choice_num_docs"] == 8 and 0 <= record["tasks/made_choice_acc_norm_se"] < 1 for record in logged)
    marks = [mark for mark in map(json.loads, (run / "manifest.jsonl").read_text().splitlines()) if mark["stage"] == "tasks"]
    assert [mark["version"] for mark in marks] == [0, 1, 2] and marks[0]["num_fewshot"] == {"made_choice": 1}
    assert marks[0]["tasks"]["made_choice"]["acc_norm"] == logged[0]["tasks/made_choice_acc_norm"]

    # The last version's folder by itself says the same; held-out data are not needed for that, and standard output is one JSON object.
    model = run / "iter_001/model"
    alone = spin_ray("eval", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=alone", f"model.path={model}", "data.eval=", *command[-2:])
    assert alone.returncode == 0, alone.stderr[-3000:]
    found = json.loads(alone.stdout)
    assert found["model"] == str(model) and "num_prompts" not in found
    assert found["tasks"]["made_choice"] == pytest.approx(marks[2]["tasks"]["made_choice"], abs=1e-4)
    assert found["num_truncated"] == 0 and "the proof at the door holds" in alone.stderr
