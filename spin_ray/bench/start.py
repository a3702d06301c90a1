"""`bench start`: from a file of rows to the first step, and through an iteration: seconds, and what the processes hold in memory.

Real: reading and tokenising, blocks, the loop, Ray Data, pool, coordinator, Ray Train's worker. Simulated: sampler engine and main player,
which take no time. Each number of rows has a process of its own. Memory is what is private to a process; that of the driver is taken in
three stretches, each at its highest: before the rows are read, until Ray starts, and from then on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spin_ray.bench.common import print_result, told_by_process
from spin_ray.bench.rows import WRITERS
from spin_ray.bench.scale import play_prepared
from spin_ray.bench.slope import memory
from spin_ray.chatter import captured_output
from spin_ray.config import load_config
from spin_ray.manifest import RunDir
from spin_ray.model import inspect_model
from spin_ray.preflight import Proof
from spin_ray.prepared import prepare
from spin_ray.system import leave, ray_cluster
from spin_ray.terminal import Terminal

LIMIT_S = 3600.0
PROMPTS_PER_S = PAIRS_PER_S = 1e6
EVERY_S = 0.5


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench start", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--block-prompts", type=int, default=64)
    parser.add_argument("--only-first-step", action="store_true", help="end there, not with the iterations")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        Path(options.one).write_text(json.dumps(measure(options)))
        return 0
    found = {}
    for rows in options.rows:
        found[rows] = told_by_process("start", *argv, "--rows", str(rows), timeout_s=LIMIT_S)
        print(rows, found[rows], flush=True)
    print_result({"rows": found, **{name: value for name, value in vars(options).items() if name != "rows"}})
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One number of rows, in this process."""
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        path = Path(folder, "rows.jsonl")
        WRITERS["jsonl"](path, options.rows[0])
        config, _ = load_config("conf/demo.yaml", [
            f"data.train={path}", "data.eval=", "data.max_prompts=0", f"run.dir={folder}", "run.name=start", "tracking.wandb.mode=disabled",
            f"spin.num_iterations={options.iterations}", f"spin.num_epochs={options.epochs}", "sampler.cpus_per_replica=0.1",
            "learner.cpus_per_worker=0.1", f"sampler.block_prompts={options.block_prompts}", "sampler.max_num_seqs=256",
            "learner.batch_pairs=1000",
        ])
        os.environ["WANDB_MODE"] = "disabled"
        run, facts = RunDir.open(config), inspect_model(config)
        with Watch(run, lambda found: Path(options.one).write_text(json.dumps(found))) as watch:
            prepared = prepare(config, run, facts, Proof(), Terminal(sys.stderr))
            watch.prepared()
            with captured_output(run.logs / "driver.log"), ray_cluster(config, samplers=False):
                watch.ends_there = options.only_first_step
                play_prepared(config, run, facts, prepared, PROMPTS_PER_S, [PAIRS_PER_S] * options.iterations)
        return watch.found()


class Watch:
    """Looks at this run's processes every half a second: what they hold at most, in MiB, and when the first step is taken."""

    def __init__(self, run: RunDir, keep: Callable[[dict[str, Any]], object]):
        """`keep`: writes down what was found, where all ends with the first step."""
        self._keep = keep
        self._metrics, self._begun = run.path / "metrics.jsonl", time.monotonic()
        self._highest: dict[str, dict[str, float]] = {}
        self._stage, self._seconds = "prepare", {}
        self.ends_there = False

    def __enter__(self) -> Watch:
        self._look()
        self._before = self._highest.pop("prepare")["driver"]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._seconds["all_s"] = self._passed()
        self._ended.set()
        self._thread.join()

    def prepared(self) -> None:
        self._seconds["prepared_s"], self._stage = self._passed(), "play"

    def found(self) -> dict[str, Any]:
        return {**self._seconds, "driver_before_mib": self._before, "highest_mib": self._highest}

    def _passed(self) -> float:
        return round(time.monotonic() - self._begun, 1)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._look()
            if "first_step_s" not in self._seconds and self._stepped():
                self._seconds["first_step_s"] = self._passed()
                self._highest["until the first step"] = dict(self._highest.get("play", {}))
                if self.ends_there:
                    self._keep(self.found())
                    leave(0)  # Ray is not shut down: its threads are at work

    def _look(self) -> None:
        stage = self._highest.setdefault(self._stage, {})
        for name, value in memory().items():
            stage[name] = max(stage.get(name, 0.0), round(value / 2**20, 1))

    def _stepped(self) -> bool:
        return self._metrics.exists() and '"train/' in self._metrics.read_text()
