"""W&B's own process may die, as `ray job stop` has it do: the run goes on, and metrics.jsonl has every metric."""

import json
import subprocess
import sys

CODE = """
import signal, sys
from pathlib import Path
import psutil
from spin_ray.config import load_config
from spin_ray.tracking import Tracker

config, _ = load_config("conf/demo.yaml", ["tracking.wandb.mode=offline"])
with Tracker(config, Path(sys.argv[1]), print) as tracker:
    tracker.log("train", {"loss": 1.0}, step=0)
    for process in psutil.Process().children(recursive=True):
        process.send_signal(signal.SIGTERM)
        process.wait()
    for step in range(1, 4):
        tracker.log("train", {"loss": 1.0}, step=step)
    tracker.table("samples", ["prompt"], [["x"]])
"""


def test_a_run_outlives_the_process_of_weights_and_biases(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("Weights & Biases' own process has ended") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
