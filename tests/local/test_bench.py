"""The benches run and print what they promise; their figures are docs/benchmarks.md's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_scale_runs_the_real_loop_with_simulated_players():
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "spin_ray", "bench", "scale", "--sizes", "3x2", "--seconds-per-hour", "0.3", "--prompts", "128"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["pairs_per_s"].keys() == {"paper 3x2"}
    case = result["cases"][0]
    assert case["ideal_s"] == round(0.3 * (4.32 + 8.64), 2) <= case["measured_s"] and result["overhead_share"] == round(1 - case["efficiency"], 4)


@pytest.mark.slow
def test_slope_nothing_is_kept_from_iteration_to_iteration():
    """With 40 MiB of weights per version: a version that stays would be seen."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "spin_ray", "bench", "slope", "--iterations", "9", "--prompts", "64"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    slopes, store = result["mib_per_iteration"], result["mib"]["object store"]
    assert slopes.keys() >= {"driver", "Coordinator", "SamplerPool", "RayTrainWorker", "object store"}
    assert max(value for name, value in slopes.items() if name != "object store") < 8, slopes
    assert min(store[-3:]) < 4 * 40, store  # an iteration's end meets one to four versions on their way; all eight would stay


@pytest.mark.slow
def test_saturation_measures_simulates_and_is_held_against_a_run(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "spin_ray", "bench", "saturation", "--sizes", "8x1", "--check", "3x2", "--costs", str(tmp_path / "costs")],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["costs"] == json.loads((tmp_path / "costs").read_text())
    pool, loop = result["costs"]["pool"], result["costs"]["loop"]
    for cost in (pool["play"], pool["heartbeat"], pool["load"], loop["play_prompt"], loop["driver_block"], loop["coordinator_read"]):
        assert 1e-6 < cost < 0.1, result["costs"]
    assert all(0.2 < ratio < 5 for ratio in result["checks"][0]["ratio"].values()), result["checks"]
    assert [row["saturated"] for row in result["rows"]] == [[], []]


def test_rows_prepares_every_format():
    done = subprocess.run(
        [sys.executable, "-m", "spin_ray", "bench", "rows", "--rows", "700", "--formats", "csv"],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["csv"]["prompts"] == 700 and result["csv"]["blocks"] == 11 and result["csv"]["peak_gib"] >= result["csv"]["imports_gib"] > 0.1


def test_shards_tells_the_memory_of_a_rank():
    done = subprocess.run(
        [sys.executable, "-m", "spin_ray", "bench", "shards", "--model", "small", "--ranks", "2", "--bucket-mib", "4"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["alone_gib"].keys() == result["each_gib"].keys()
    for part in ("load", "export", "save", "resume"):  # in a step of so small a model, what every rank has counts for more
        assert result["alone_gib"][part] > result["each_gib"][part] > 0.02, part
