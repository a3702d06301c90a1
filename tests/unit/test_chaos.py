"""The chaos bench notices what it is there to notice; the jobs here are small scripts."""

import dataclasses
import itertools
import random
import sys

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from spin_ray.bench import chaos
from spin_ray.bench.chaos import Job, compare, torment
from spin_ray.exchange.pairs import write_table
from spin_ray.manifest import RunDir
from spin_ray.records import PAIR_SCHEMA, to_table


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(chaos, "LINGER_S", 0.3)
    monkeypatch.setattr(chaos, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(chaos, "BLIND_SHARE", 0.0)


def play(run, script, num_faults, kind="driver"):
    run.mkdir()
    job = Job([sys.executable, "-c", f"run = {str(run)!r}\n" + script], run, patience_s=2.0)
    with job:
        torment(job, itertools.repeat(kind), num_faults, random.Random(0))
    return job


STEPS = """
import os, time
for step in range({steps}):
    with open(run + "/metrics.jsonl", "a") as file:
        file.write("step\\n")
    time.sleep(0.1)
"""


def test_a_job_that_goes_on_survives_every_fault(tmp_path):
    job = play(tmp_path / "run", STEPS.format(steps=10) + "os._exit(os.path.getsize(file.name) < 60)", num_faults=2)
    assert [(fault.survived, fault.restarts > 0) for fault in job.faults] == [(True, True)] * 2 and job.leftovers == []


def test_a_job_that_hangs_after_a_fault_has_not_survived_it(tmp_path):
    stuck = STEPS.format(steps=5) + "open(run + '/begun', 'x')\ntime.sleep(60)"
    job = play(tmp_path / "run", "import os, time\nif os.path.exists(run + '/metrics.jsonl'): time.sleep(60)\n" + stuck, num_faults=1)
    assert [fault.survived for fault in job.faults] == [False] and job.leftovers == []


def test_a_job_that_always_fails_is_not_started_for_ever(tmp_path):
    job = play(tmp_path / "run", STEPS.format(steps=3) + "os._exit(2)", num_faults=1)
    assert [(fault.survived, fault.restarts) for fault in job.faults] == [(False, chaos.MOST_RESTARTS)]


def test_what_a_job_leaves_behind_is_counted_and_ended(tmp_path):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
    job = play(tmp_path / "run", child + STEPS.format(steps=8), num_faults=0)
    assert len(job.leftovers) == 1
    psutil.wait_procs(job.leftovers, timeout=60)
    assert not job.leftovers[0].is_running()


def test_compare_counts_what_is_missing_double_and_wrong(tmp_path, make_pairs):
    def write(name, changes=()):
        run = RunDir(tmp_path / name)
        blocks = [make_pairs(4), [dataclasses.replace(pair, prompt_id=pair.prompt_id + 4) for pair in make_pairs(4, seed=1)]]
        for block, change in changes:
            blocks[block] = change(blocks[block])
        for index, block in enumerate(blocks):
            write_table(run.pairs(0, "block", index), to_table(block, PAIR_SCHEMA))
        run.model(0).mkdir(parents=True)
        save_file({"weight": np.ones(2, np.float32)}, run.model(0) / "model.safetensors")
        (run.path / "manifest.jsonl").write_text("")
        return run.path

    alone = write("alone")
    nothing = dict.fromkeys(("missing_pairs", "duplicate_pairs", "wrong_version_pairs", "different_answers", "missing_models"), 0)
    assert compare(alone, write("same")) == {**nothing, "weight_difference": 0.0, "nll_difference": 0.0}
    bad = write("bad", [
        (0, lambda block: block[1:]),
        (1, lambda block: [*block, dataclasses.replace(block[0], opponent_version=1, generated_ids=block[1].generated_ids)]),
    ])
    save_file({"weight": np.full(2, 1.5, np.float32)}, bad / "iter_000/model/model.safetensors")
    found = {"missing_pairs": 1, "duplicate_pairs": 1, "wrong_version_pairs": 1, "different_answers": 1, "weight_difference": 0.5}
    assert compare(alone, bad) == {**nothing, "nll_difference": 0.0, **found}
    (bad / "iter_000/model/model.safetensors").unlink()
    assert compare(alone, bad)["missing_models"] == 1
