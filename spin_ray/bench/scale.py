"""`bench scale`: what the orchestration costs when the players take exactly the time that they are told to.

Real: the loop, Ray Data, pool, coordinator, Ray Train's worker group, blocks, manifest. Simulated: sampler engines and main
player, which sleep. The paper's proportions (table 2: an iteration's generation takes 1.45 h, its training 4.32 h, from
iteration 1 on 8.64 h), scaled down in time; ideal is max(generation, training) of every iteration, as if nothing else took
time. `generation-bound` is a job whose generation takes twice its training, to see the samplers scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spin_ray.bench.common import print_result
from spin_ray.chatter import captured_output
from spin_ray.config import Config, load_config
from spin_ray.interrupt import Interrupts
from spin_ray.learner.fake import make_fake_player
from spin_ray.learner.group import Learner
from spin_ray.manifest import RunDir
from spin_ray.model import ModelFacts, inspect_model
from spin_ray.placement import choose_hardware, nodes_of_cluster
from spin_ray.players import Players, as_placed
from spin_ray.preflight import Proof
from spin_ray.prepared import Prepared, written
from spin_ray.records import Prompt, Saved, Version
from spin_ray.sampler.fake import FakeFleet, FakeSampler, FleetMember
from spin_ray.sampler.pool import Fleet, Limits, start_pool
from spin_ray.scaling import Rates, needed
from spin_ray.selfplay import SelfPlay
from spin_ray.system import ray_cluster
from spin_ray.terminal import Terminal
from spin_ray.theta import thetas_of
from spin_ray.timeline import iteration_windows, read_spans
from spin_ray.tracking import Tracker

HOURS = {"paper": (1.45, (4.32, 8.64)), "generation-bound": (8.64, (4.32, 4.32))}
"""Proportions -> (generation of an iteration, training of iteration 0 and of later ones), in hours of the paper's run."""
CEILING = (1.45 * 2 + 4.32 + 8.64) / (4.32 + 8.64)
"""What perfect overlap gains over playing and training in turn, in two iterations of the paper's run; 1.19 over its four."""
SIZES = ((1, 1), (4, 1), (16, 2), (64, 1), (64, 8))
REPLICAS_PER_PROCESS = 16
SCORES_PER_SAMPLE = 50
"""A prefill of an answer takes this much less of an engine's time than sampling it, token by token."""


@dataclass(frozen=True)
class Case:
    proportions: str
    num_replicas: int
    num_workers: int


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench scale", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds-per-hour", type=float, default=4.0, help="what an hour of the paper's run takes here")
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--sizes", nargs="*", default=[f"{r}x{w}" for r, w in SIZES], help="replicas x workers, such as 64x8")
    parser.add_argument("--find", action="store_true", help="only: let the policy find the number of replicas by itself")
    options = parser.parse_args(argv)
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    cases = [Case("paper", *size) for size in sizes] + [Case("generation-bound", *size) for size in sizes if size[1] == 1]
    if options.find:
        with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
            found = find(Path(folder), seconds_per_hour=options.seconds_per_hour, num_prompts=options.prompts)
        print_result({"found": found, "seconds_per_hour": options.seconds_per_hour})
        return 0
    results = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
            results.append(measure(case, Path(folder), seconds_per_hour=options.seconds_per_hour, num_prompts=options.prompts))
        print(results[-1], flush=True)
    largest = max((r for r in results if r["proportions"] == "paper"), key=lambda r: (r["num_replicas"], r["num_workers"]))
    print_result({
        "pairs_per_s": {f"{r['proportions']} {r['num_replicas']}x{r['num_workers']}": r["pairs_per_s"] for r in results},
        "efficiency": largest["efficiency"], "overhead_share": round(1 - largest["efficiency"], 4),
        "overlap_ceiling_over_sequential": round(CEILING, 3), "seconds_per_hour": options.seconds_per_hour, "cases": results,
    })
    return 0


def measure(case: Case, folder: Path, *, seconds_per_hour: float, num_prompts: int) -> dict[str, Any]:
    """Play two iterations; the efficiency is ideal over measured seconds, from the first play to the last step."""
    generation, trainings = HOURS[case.proportions]
    generation_s, training_s = generation * seconds_per_hour, [hours * seconds_per_hour for hours in trainings]
    speed, rates = speeds(num_prompts, generation_s, training_s, case.num_replicas)
    keys = [f"sampler.num_replicas={case.num_replicas}", f"learner.num_workers={case.num_workers}"]
    _, measured = _played(folder, keys, speed, rates, num_prompts)
    ideal = sum(max(generation_s, seconds) for seconds in training_s)
    return {
        "proportions": case.proportions, "num_replicas": case.num_replicas, "num_workers": case.num_workers,
        "ideal_s": round(ideal, 2), "measured_s": round(measured, 2), "efficiency": round(ideal / measured, 4),
        "pairs_per_s": round(2 * num_prompts / measured, 1),
        "gain_over_sequential": round((2 * generation_s + sum(training_s)) / measured, 3),
    }


def speeds(num_prompts: int, generation_s: float, training_s: Sequence[float], num_replicas: int) -> tuple[float, list[float]]:
    """Prompts per second of a replica, pairs per second of the main player in each iteration."""
    speed = num_prompts / generation_s / num_replicas * (1 + 1 / SCORES_PER_SAMPLE)  # sampling and scoring y (replay may) fill it
    return speed, [2 * num_prompts * (1 + (t > 0)) / seconds for t, seconds in enumerate(training_s)]


def settings(folder: Path, name: str) -> list[str]:
    """Of a run whose players are fake."""
    return [
        f"run.dir={folder}", f"run.name={name}", "data.eval=''", "spin.num_iterations=2", "spin.num_epochs=2",
        "tracking.wandb.mode=disabled", "sampler.cpus_per_replica=0", "learner.cpus_per_worker=0.01", "sampler.block_prompts=8",
        "sampler.max_num_seqs=8",
    ]


def _played(folder: Path, keys: Sequence[str], speed: float, rates: Sequence[float], num_prompts: int) -> tuple[RunDir, float]:
    """A run of two iterations, and the seconds from its first play to its last step."""
    config, _ = load_config("conf/demo.yaml", [*settings(folder, "scale"), *keys])
    run = RunDir.open(config)
    os.environ["WANDB_MODE"] = "disabled"
    with captured_output(run.logs / "driver.log"), ray_cluster(config, samplers=False):
        play(config, run, speed, rates, num_prompts)
    windows = iteration_windows(read_spans(run.path))
    return run, windows[1][1] - windows[0][0]


FIND = 8
"""Replicas that would play an iteration in the paper's time, where the policy is to find how many are needed."""


def find(folder: Path, *, seconds_per_hour: float, num_prompts: int) -> dict[str, Any]:
    """From one replica on, at most twelve: how many the policy takes in each of two iterations, beside how many keep up."""
    generation, trainings = HOURS["paper"]
    training_s = [hours * seconds_per_hour for hours in trainings]
    speed, rates = speeds(num_prompts, generation * seconds_per_hour, training_s, FIND)
    run, measured = _played(folder, ["sampler.num_replicas={min: 1, max: 12}"], speed, rates, num_prompts)
    changes = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines() if "sampler/num_replicas" in line]
    true = Rates(speed / (1 + 1 / SCORES_PER_SAMPLE), speed * SCORES_PER_SAMPLE, rates[0])
    return {
        "needed": [round(needed(dataclasses.replace(true, trained=rates[t]), num_prompts, t * num_prompts), 2) for t in (0, 1)],
        "found": [[change["sampler/num_replicas"] for change in changes if change["iteration"] == t] for t in (0, 1)],
        "measured_s": round(measured, 1), "trained_s": round(sum(training_s), 1),
    }


@dataclass(frozen=True)
class TurnCosts:
    """Seconds that it takes a player to give its memory back, and to take it again."""

    sleep_s: float = 0.0
    """The opponent."""
    wake_s: float = 0.0
    rest_s: float = 0.0
    """The main player."""
    return_s: float = 0.0


def start_fakes(
    count: int, speed: float, costs: TurnCosts = TurnCosts(), *, answer_tokens: int = 8, per_process: int = REPLICAS_PER_PROCESS
) -> list[FleetMember]:
    """Handles of `count` replicas. Several share a process: 64 idle actors take most of a core by themselves."""
    actor = ray.remote(num_cpus=0, max_concurrency=10_000)(FakeFleet)
    times = {"prompts_per_s": speed, "scores_per_s": speed * SCORES_PER_SAMPLE, "sleep_s": costs.sleep_s, "wake_s": costs.wake_s}
    samplers = [FakeSampler(Version(0), **times, answer_tokens=answer_tokens) for _ in range(count)]
    parts = [samplers[start : start + per_process] for start in range(0, count, per_process)]
    fleets = [actor.remote(part) for part in parts]
    return [FleetMember(fleet, member) for fleet, part in zip(fleets, parts, strict=True) for member in range(len(part))]


def play(
    config: Config, run: RunDir, speed: float, rates: Sequence[float], num_prompts: int, *, weights_mib: float = 0.0,
    costs: TurnCosts = TurnCosts(),
) -> None:
    """The whole loop with fake players, on prompts of random tokens."""
    facts, rng = inspect_model(config), np.random.default_rng(0)
    ids = rng.integers(5, 500, (num_prompts, 52)).astype(np.int32)
    prompts = [Prompt(number, row[:40], row[40:]) for number, row in enumerate(ids)]
    prepared = written(run, prompts, [], config.sampler.block_prompts)
    play_prepared(config, run, facts, prepared, speed, rates, weights_mib=weights_mib, costs=costs)


def play_prepared(
    config: Config, run: RunDir, facts: ModelFacts, prepared: Prepared, speed: float, rates: Sequence[float], *, weights_mib: float = 0.0,
    costs: TurnCosts = TurnCosts(),
) -> None:
    """The same on a run's own prompts."""
    hardware = choose_hardware(config, nodes_of_cluster())
    samplers = start_fakes(config.sampler.fewest, speed, costs)
    ray.get([sampler.ready.remote() for sampler in samplers])  # all 64 are up before the clock runs
    pool = start_pool(samplers, Version(0), Limits(config.sampler.max_num_seqs), FleetMember.end)
    make_player = functools.partial(
        make_fake_player, pairs_per_s=rates, weights_mib=weights_mib, rest_s=costs.rest_s, wake_s=costs.return_s
    )
    learner = Learner(config, hardware, saved=Saved(""), logs=run.logs, make_player=make_player)
    with Tracker(config, run.path) as tracker, open(os.devnull, "w") as nowhere:
        thetas, terminal, fleet = thetas_of(config, run, facts), Terminal(nowhere), Fleet(lambda _: start_fakes(1, speed, costs)[0])
        players = Players(pool, learner, hardware.takes_turns, fleet)
        config = as_placed(config, hardware, terminal.say)
        SelfPlay(config, thetas, facts, prepared, hardware, players, Proof(), tracker, terminal, Interrupts()).play()
    learner.stop()
