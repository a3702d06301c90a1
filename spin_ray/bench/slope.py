"""`bench slope`: does a long run keep what it should have let go? Memory of every process, iteration after iteration.

Real: the loop, Ray Data, pool, coordinator, Ray Train's worker group, the object store with published weights and blocks.
Simulated, unless `--real`: sampler engines and main player. Measured at the end of every iteration but the last: each kind of
process's private memory and the object store's used bytes. The slope is that of a straight line through all but the first third.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from spin_ray.bench.common import print_result, processes
from spin_ray.bench.scale import play
from spin_ray.chatter import captured_output
from spin_ray.config import load_config
from spin_ray.manifest import RunDir
from spin_ray.selfplay import run_method
from spin_ray.system import ray_cluster

STORE = "object store"
PROMPTS_PER_S, PAIRS_PER_S = 2000.0, 2000.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench slope", description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--weights-mib", type=float, default=40.0,
                        help="what each simulated version's weights take; more than malloc keeps for itself once freed (32)")
    parser.add_argument("--real", action="store_true", help="the demo's model in vLLM and DeepSpeed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        found = measure(Path(folder), options)
    slopes = {name: round(slope(values), 3) for name, values in found.items()}
    for name, values in sorted(found.items()):
        print(f"{name:<16} {slopes[name]:>8.3f} MiB per iteration; MiB: {' '.join(f'{value:.0f}' for value in values)}", flush=True)
    print_result({"mib_per_iteration": slopes, **vars(options), "mib": found})
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Play all iterations; returns the MiB of each kind of process, and of the object store, after every one but the last."""
    config, _ = load_config("conf/demo.yaml", [
        f"run.dir={folder}", "run.name=slope", "data.eval=''", f"spin.num_iterations={options.iterations}", "run.keep_pairs_iterations=1",
        f"data.max_prompts={options.prompts}", "sampler.cpus_per_replica=0.4", "learner.cpus_per_worker=0.4", "sampler.block_prompts=16",
        "tracking.wandb.mode=disabled",
    ])
    os.environ["WANDB_MODE"] = "disabled"
    run, found = RunDir.open(config), {}
    watch = threading.Thread(target=look, args=(run, options.iterations - 1, found), daemon=True)
    watch.start()
    if options.real:
        run_method(config)
    else:
        rates = [PAIRS_PER_S] * options.iterations
        with captured_output(run.logs / "driver.log"), ray_cluster(config, samplers=False):
            play(config, run, PROMPTS_PER_S, rates, options.prompts, weights_mib=options.weights_mib)
    watch.join()
    return {name: values for name, values in found.items() if len(values) == options.iterations - 1}


def look(run: RunDir, num_iterations: int, found: dict[str, list[float]]) -> None:
    """At the end of each iteration, what everything holds, in MiB."""
    for number in range(num_iterations):
        while len(run.marks("iteration")) <= number:
            time.sleep(0.02)
        state = get_state_from_address(ray.get_runtime_context().gcs_address)  # no public call tells what the store holds
        used = get_memory_info_reply(state).store_stats.object_store_bytes_used
        for name, value in {**memory(), STORE: used}.items():
            found.setdefault(name, []).append(round(value / 2**20, 1))


def memory() -> dict[str, int]:
    """Private bytes of this run's processes, summed by what they are."""
    found = Counter()
    for name, process in processes():
        with suppress(psutil.NoSuchProcess):  # it ended while we looked
            held = process.memory_info()
            found[name] += held.rss - held.shared
    return found


def slope(values: Sequence[float]) -> float:
    """MiB per iteration, the first third left out."""
    late = values[len(values) // 3 :]
    return float(np.polyfit(np.arange(len(late)), late, 1)[0])
