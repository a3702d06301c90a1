"""`bench saturation`: at which size does the pool, the driver, a play process or the coordinator not keep up?

Measured here, in CPU seconds: what one event costs each of them (pool_costs.py, loop_costs.py), and how right the simulation is, on
runs that this machine can play (`--check`). Simulated (day.py): a day at sizes that it cannot. Two ways to grow from the paper's run
(50,000 prompts, 1.45 h of generation, 4.32 h of training, from iteration 1 on 8.64 h), with eight replicas as fast as its eight GPUs:

- `more work`: the hours stay, prompts and batch grow with the replicas. What the players do in an hour grows, and nothing gets shorter.
- `fewer hours`: the work stays, the hours shrink. Iterations' borders come more often, and steps of the same 64 pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spin_ray.bench.common import print_result
from spin_ray.bench.costs import Costs, LoopCosts, PoolCosts
from spin_ray.bench.day import Day, Outcome, Setup
from spin_ray.errors import BadInput

HOUR_S, DAY_S = 3600.0, 24 * 3600.0
PROMPTS, GENERATION_H, TRAINING_H, REPLICAS, BATCH = 50_000, 1.45, 4.32, 8, 64
"""The paper's iteration 0, on eight GPUs; later ones have twice the pairs, and twice the hours."""
SCORES_PER_SAMPLE = 50
LOAD_S = 5.0
"""Assumed: publishing 7B weights, a pass over the network, loading them."""
SIZES = ((8, 1), (64, 8), (256, 32), (512, 64), (1024, 128), (2048, 256), (4096, 512), (8192, 1024))
CHECKS = ((4, 1), (16, 2), (64, 8))
CHECK_PROMPTS = 1024
KINDS = {"pool": "SamplerPool", "play process": "MapWorker", "driver": "driver", "coordinator": "Coordinator"}
FULL, LOST = 1.0, 0.05
"""Saturated: it would have to work for longer than the play takes without it, or so much of the day is lost."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench saturation", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", type=_size, default=SIZES, help="replicas x workers; the first that is full is the last")
    parser.add_argument("--check", nargs="*", type=_size, default=CHECKS, help="sizes that are also played here")
    parser.add_argument("--seconds-per-hour", type=float, default=2.0, help="what an hour of the paper's run takes in a check")
    parser.add_argument("--faster", type=float, default=1.0, help="than the paper's GPUs, both players")
    parser.add_argument("--costs", type=Path, help="a file of costs: read if it is there, else measured and written")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        costs, checks = _measured(Path(folder), options)
    for name, seconds in {**{f"pool_{name}": cost for name, cost in asdict(costs.pool).items()}, **asdict(costs.loop)}.items():
        print(f"{name:<24} {seconds:>9,.0f} bytes" if name.endswith("bytes") else f"{name:<24} {1e6 * seconds:>9.1f} us", flush=True)
    for check in checks:
        print(f"played here: {check['size']:>7}  simulated / measured CPU seconds: {check['ratio']}", flush=True)
    rows = [row for way in WAYS for row in _until_full(_row(way, *size, options.faster, costs) for size in options.sizes)]
    print_result({
        "saturated": {way: next((row["size"] for row in rows if row["way"] == way and row["saturated"]), None) for way in WAYS},
        "faster": options.faster, "checks": checks, "rows": rows, "costs": asdict(costs),
    })
    return 0


def _until_full(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The sizes up to the first one that is saturated."""
    for row in rows:
        yield row
        if row["saturated"]:
            return


def _size(text: str) -> tuple[int, int]:
    """512x64 -> (512, 64)."""
    replicas, _, workers = text.partition("x")
    if not (replicas.isdecimal() and workers.isdecimal() and int(replicas) and int(workers)):
        raise argparse.ArgumentTypeError(f"{text}: give replicas x workers, such as 512x64")
    return int(replicas), int(workers)


def more_work(replicas: int, workers: int, faster: float) -> Setup:
    grown = replicas / REPLICAS * faster
    prompts = round(PROMPTS * grown)
    return Setup(
        replicas, workers, prompts, drawn_per_s=prompts / (GENERATION_H * HOUR_S) / replicas * (1 + 1 / SCORES_PER_SAMPLE),
        scored_per_s=prompts / (GENERATION_H * HOUR_S) / replicas * SCORES_PER_SAMPLE, trained_per_s=2 * prompts / (TRAINING_H * HOUR_S),
        batch_pairs=round(BATCH * grown), load_s=LOAD_S,
    )


def fewer_hours(replicas: int, workers: int, faster: float) -> Setup:
    grown = replicas / REPLICAS * faster
    trained_per_s = 2 * PROMPTS * grown / (TRAINING_H * HOUR_S)
    return replace(more_work(replicas, workers, faster), prompts=PROMPTS, batch_pairs=BATCH, trained_per_s=trained_per_s)


WAYS = {"more work": more_work, "fewer hours": fewer_hours}


def _row(way: str, replicas: int, workers: int, faster: float, costs: Costs) -> dict[str, Any]:
    """A day at this size, beside the same day with a control plane that takes no time."""
    setup = WAYS[way](replicas, workers, faster)
    row = {"way": way, "size": f"{replicas}x{workers}", **compare(setup, Day(setup, Costs()).run(), Day(setup, costs).run())}
    row["rank_reads_share"] = round(costs.loop.rank_pair * setup.trained_per_s / setup.epochs, 4)
    print(_line(row), flush=True)
    return row


def compare(setup: Setup, ideal: Outcome, real: Outcome) -> dict[str, Any]:
    """A day is iteration 0 and as many like iteration 1 as fit.

    Load: the work that a process has while iteration 1 is played and in iteration 0, in seconds, by the seconds that their play takes
    without it; above 1 it cannot keep up.
    """
    played = sum(ideal.played_s)
    load = {name: busy / played for name, busy in real.busy_playing_s.items()}
    load["play process"] /= setup.play_processes
    first, later = (slow - fast for slow, fast in zip(real.iteration_s, ideal.iteration_s, strict=True))
    lost = (first + later * (DAY_S - real.iteration_s[0]) / real.iteration_s[1]) / DAY_S
    return {
        "prompts": setup.prompts, "prompts_per_s": round(setup.replicas * setup.drawn_per_s, 1),
        "load": {name: round(value, 4) for name, value in load.items()},
        "busy": {name: round(busy / real.ended_s, 4) for name, busy in real.busy_s.items()},
        "play_takes": round(sum(real.played_s) / played, 3), "lost": round(lost, 4),
        "longest_wait_s": {name: round(seconds, 2) for name, seconds in real.longest_wait_s.items()},
        "saturated": [name for name, value in load.items() if value > FULL] or (["the day"] if lost > LOST else []),
    }


def _line(row: dict[str, Any]) -> str:
    load = "  ".join(f"{name} {value:7.2%}" for name, value in row["load"].items())
    result = f"play takes {row['play_takes']:.2f}  lost {row['lost']:.2%}  {', '.join(row['saturated'])}"
    return f"{row['way']:<11} {row['size']:>9}  {load}  {result}"


def _measured(folder: Path, options: argparse.Namespace) -> tuple[Costs, list[dict[str, Any]]]:
    """Costs and checks, unless the file has the costs."""
    if options.costs and options.costs.exists():
        return read_costs(options.costs), []
    from spin_ray.bench.loop_costs import measure_loop  # not at the top: nothing else here needs Ray
    from spin_ray.bench.pool_costs import measure_pool
    from spin_ray.bench.scale import settings
    from spin_ray.chatter import captured_output
    from spin_ray.config import load_config
    from spin_ray.system import ray_cluster

    config, _ = load_config("conf/demo.yaml", settings(folder, "costs"))
    os.environ["WANDB_MODE"] = "offline"
    with captured_output(folder / "log"), ray_cluster(config, samplers=False):
        costs = Costs(measure_pool(), measure_loop(config, folder))
        if options.costs:
            options.costs.write_text(json.dumps(asdict(costs)))
        checks = [_check(folder, *size, options.seconds_per_hour, costs) for size in options.check]
    return costs, checks


def _check(folder: Path, replicas: int, workers: int, seconds_per_hour: float, costs: Costs) -> dict[str, Any]:
    """A run that is played here and simulated: CPU seconds of each process, and by how much the simulation is off."""
    from spin_ray.bench.observed import play_here

    setup, measured, seconds = play_here(folder, replicas, workers, seconds_per_hour=seconds_per_hour, prompts=CHECK_PROMPTS)
    under_way = Costs(replace(costs.pool, join=0.0), replace(costs.loop, driver_begin=0.0))  # the window begins with the first play
    slower = max(1.0, seconds / Day(setup, Costs()).run().ended_s)  # than it should have been: what is idle is so for longer
    paced = {name: getattr(setup, name) / slower for name in ("drawn_per_s", "scored_per_s", "trained_per_s")}
    simulated = Day(replace(setup, **paced), under_way).run()
    found = {name: (round(simulated.busy_s[name], 2), round(measured[kind], 2)) for name, kind in KINDS.items()}
    return {
        "size": f"{replicas}x{workers}", "seconds": round(seconds, 1), "slower": round(slower, 2), "simulated_and_measured_cpu_s": found,
        "ratio": {name: round(ours / theirs, 2) for name, (ours, theirs) in found.items()},
        "others_cpu_s": {kind: round(s, 2) for kind, s in sorted(measured.items()) if kind not in KINDS.values()},
    }


def read_costs(path: Path) -> Costs:
    """What an earlier run has measured. Raises BadInput if that is not what lies there."""
    try:
        values = json.loads(path.read_text())
        return Costs(PoolCosts(**values["pool"]), LoopCosts(**values["loop"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--costs {path}: no costs of this version ({error}); remove it to measure them again") from error
