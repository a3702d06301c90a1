"""What driver, play processes, coordinator and a learner's rank take for each of their events, in CPU seconds: real parts, fake players."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spin_ray.background import in_background
from spin_ray.bench.common import Meter, cpu_seconds, idle_shares
from spin_ray.bench.costs import LoopCosts, slope
from spin_ray.bench.pool_costs import BLOCK
from spin_ray.bench.scale import start_fakes
from spin_ray.bench.stand_ins import SETTINGS, TOKENS, Ranks
from spin_ray.config import Config
from spin_ray.exchange.pairs import PlayPlan, Stored, play, write_prompts
from spin_ray.learner.coordinator import Base, Coordinator
from spin_ray.learner.group import POLL_S
from spin_ray.learner.kept import Kept
from spin_ray.learner.messages import Stop
from spin_ray.manifest import RunDir
from spin_ray.methods import method_of
from spin_ray.model import inspect_model
from spin_ray.overlap import Overlap
from spin_ray.placement import beside_driver
from spin_ray.preflight import Proof
from spin_ray.records import Prompt, Saved, Span, Version, opponent_reference
from spin_ray.reporting import Reporting
from spin_ray.sampler.fake import FleetMember
from spin_ray.sampler.pool import Limits, start_pool
from spin_ray.storage import DISK
from spin_ray.terminal import Terminal
from spin_ray.timeline import Timeline
from spin_ray.tracking import Tracker

READERS = 8
"""Processes that stand for the learner's ranks, each for eight where there are 64."""
FEW, MANY = 17, 257
"""Blocks in flight between which what a block costs the driver is taken for a straight line."""


@dataclass(frozen=True)
class Pipeline:
    """What a run of the play pipeline took, in CPU seconds."""

    begin: float
    """Of the driver, until all was in flight."""
    idle: Counter[str]
    """In a second in which nothing happened, by kind of process."""
    driver: float
    """For a block, from the release on."""
    play: float
    """Of a play process, the same."""


def measure_loop(config: Config, folder: Path) -> LoopCosts:
    """A minute on two free cores."""
    numbers = small, _, many = 150, 40, 500
    one, block, waiting = (
        _pipeline(config, folder / f"pipeline_{number}", number, size, in_flight)
        for number, size, in_flight in zip(numbers, (1, BLOCK, 1), (FEW, FEW, MANY), strict=True)
    )
    with _ranks() as actors:
        alone, few, all_ranks = (_blocks(actors, ranks) for ranks in (0, READERS, READERS**2))
        reports, command = _reports(config, folder / "reports", actors[0]), _command(actors)
    play_prompt, block_waiting = slope((1, one.play), (BLOCK, block.play)), slope((FEW, one.driver), (MANY, waiting.driver))
    read = slope((READERS, few["Coordinator"]), (READERS**2, all_ranks["Coordinator"]))
    return LoopCosts(
        play_block=max(0.0, one.play - play_prompt), play_prompt=play_prompt, play_idle=one.idle["MapWorker"],
        driver_block=max(0.0, one.driver - FEW * block_waiting),
        driver_block_waiting=block_waiting, driver_begin=slope((small, one.begin), (many, waiting.begin)),
        driver_read=slope((0, alone["driver"]), (READERS, few["driver"])), driver_idle=one.idle["driver"],
        driver_waiting=slope((FEW, one.idle["driver"]), (MANY, waiting.idle["driver"])),
        driver_report=reports["driver"], driver_span=_span_to_keep(folder),
        coordinator_block=alone["Coordinator"], coordinator_read=read, coordinator_command=command,
        coordinator_report=reports["Coordinator"], coordinator_poll=reports["poll"],
        coordinator_idle=one.idle["Coordinator"], rank_pair=_rank_pair(folder / "pipeline_40"),
    )


def _pipeline(config: Config, folder: Path, blocks: int, size: int, in_flight: int) -> Pipeline:
    """Ray Data, its play processes and the driver's loop over what is played; replicas that answer at once."""
    run = _run(config, folder)
    sizes, _ = write_prompts(run, _prompts(blocks * size), size)
    overlap, pool = Overlap(config, method_of(config), sizes), _pool()
    plan, specs = PlayPlan(run, pool, [SETTINGS]), overlap.blocks(0)
    finished, counted = threading.Event(), threading.Event()
    with _reporting(config, run, overlap) as reporting, _coordinator() as coordinator:

        def hand_on() -> None:  # what the driver's thread does with every block (opponent.py)
            for block, played in play(plan, specs, in_flight):
                path = run.pairs(block.iteration, block.kind, block.index)
                _put(coordinator, block.place, Stored(path, run.storage))
                reporting.played(block, played, path)
                if block == specs[-1]:
                    finished.set()
                    counted.wait()  # behind the last block its processes go

        begun = cpu_seconds()["driver"]
        playing = in_background(hand_on)
        _until_quiet()
        begin, idle = cpu_seconds()["driver"] - begun, idle_shares()
        meter = Meter(idle)
        ray.get(pool.release.remote(Version(0)))
        _wait(finished, playing)
        took = meter.each(blocks)
        counted.set()
        playing.result()
    ray.kill(pool)
    return Pipeline(begin, idle, took["driver"], took["MapWorker"])


def _wait(event: threading.Event, working: Future) -> None:
    """Until the event, or the end of who would set it."""
    while not event.wait(0.02):
        if working.done():
            working.result()


def _put(coordinator: Any, place: int, block: Any) -> None:
    ray.get(coordinator.put_block.remote(0, place, [ray.put(block)]))


def _until_quiet() -> None:
    """Until the play processes have started, and all blocks are in flight."""
    last, now = -1.0, 0.0
    while now == 0.0 or now - last > 0.05:
        time.sleep(2.0)
        last, now = now, cpu_seconds().get("MapWorker", 0.0)


def _prompts(count: int) -> list[Prompt]:
    ids = np.arange(TOKENS, dtype=np.int32)
    return [Prompt(number, ids, ids) for number in range(count)]


def _run(config: Config, folder: Path) -> RunDir:
    return RunDir.open(replace(config, run=replace(config.run, dir=str(folder.parent), name=folder.name)))


def _pool() -> Any:
    fakes = start_fakes(8, 1e6, answer_tokens=TOKENS)
    return start_pool(fakes, Version(0), Limits(BLOCK), FleetMember.end)


@contextmanager
def _coordinator() -> Iterator[Any]:
    coordinator = ray.remote(**beside_driver(), max_concurrency=1_000)(Coordinator).remote(Base(Saved(""), None))
    ray.get(coordinator.group.remote())  # it is up: its start is none of what is measured
    yield coordinator
    ray.kill(coordinator)


@contextmanager
def _reporting(config: Config, run: RunDir, overlap: Overlap) -> Iterator[Reporting]:
    """With W&B as in a run that is offline."""
    with Tracker(config, run.path) as tracker, open(os.devnull, "w") as nowhere:
        yield Reporting(config, method_of(config), run, inspect_model(config).chat, overlap, Proof(), tracker, Terminal(nowhere))


@contextmanager
def _ranks() -> Iterator[list[Any]]:
    """Actors that stand for the learner's ranks."""
    ranks = [ray.remote(num_cpus=0)(Ranks).remote() for _ in range(READERS)]
    ray.get([rank.ready.remote() for rank in ranks])
    yield ranks
    for rank in ranks:
        ray.kill(rank)


NUM_BLOCKS, NUM_COMMANDS, NUM_STEPS = 100, 20, 400
PACE_S = 0.05
"""Between two blocks: every rank hears of each by itself."""


def _blocks(actors: Sequence[Any], ranks: int) -> dict[str, float]:
    """A block is put there, and so many ranks fetch it: CPU seconds of driver and coordinator."""
    with _coordinator() as coordinator:
        reading = [actor.read.remote(coordinator, ranks // READERS, NUM_BLOCKS) for actor in actors if ranks]
        meter = Meter(idle_shares())
        for place in range(NUM_BLOCKS):
            _put(coordinator, place, Stored(Path("block"), DISK))
            time.sleep(PACE_S)
        ray.get(reading)
        return meter.each(NUM_BLOCKS)


def _command(actors: Sequence[Any]) -> float:
    """CPU seconds of the coordinator for each rank that a command reaches."""
    with _coordinator() as coordinator:
        following = [actor.follow.remote(coordinator, READERS, NUM_COMMANDS) for actor in actors]
        meter = Meter(idle_shares())
        for _ in range(NUM_COMMANDS):
            ray.get(coordinator.post.remote([ray.put(Stop())]))
            time.sleep(PACE_S)
        ray.get(following)
        return meter.each(NUM_COMMANDS * READERS**2)["Coordinator"]


def _reports(config: Config, folder: Path, actor: Any) -> dict[str, float]:
    """CPU seconds for a step's report, and "poll": of the coordinator for a question that finds none."""
    run = _run(config, folder)
    overlap = Overlap(config, method_of(config), [BLOCK])
    with _coordinator() as coordinator, _reporting(config, run, overlap) as reporting:
        meter = Meter(idle := idle_shares())
        for _ in range(NUM_STEPS):
            ray.get(coordinator.drain.remote())
        polls, meter, heard = meter.each(NUM_STEPS), Meter(idle), 0
        told = actor.report.remote(coordinator, NUM_STEPS)
        while heard < NUM_STEPS:
            for record in ray.get(coordinator.drain.remote()):
                reporting.step(record)
                heard += 1
            time.sleep(POLL_S)
        ray.get(told)
        return {**meter.each(NUM_STEPS), "poll": polls["Coordinator"]}


def _rank_pair(folder: Path) -> float:
    """In this process: CPU seconds of a pair that is read and kept."""
    kept, begun, count = Kept(), time.thread_time(), 0
    for path in sorted(folder.rglob("iter_000/pairs/block_*.parquet")):
        pairs = Stored(path, DISK).pairs()
        kept.extend([(pair, np.array([opponent_reference(pair)])) for pair in pairs])
        count += len(pairs)
    return (time.thread_time() - begun) / count


def _span_to_keep(folder: Path) -> float:
    """In this process: what a span takes that the driver hears of, with the drawing that follows left out."""
    spans = pickle.dumps([Span(f"opponent {k % 512}", "play", 0, 10.0 * (k // 512), 10.0 * (k // 512) + 9) for k in range(20_000)])
    begun = time.thread_time()
    timeline = Timeline(folder)
    timeline.add([*pickle.loads(spans), Span("main player", "train", 0, 0.0, 400.0)])
    timeline.idle_share(0)
    return (time.thread_time() - begun) / 20_000
