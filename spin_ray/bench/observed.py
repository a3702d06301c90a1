"""A run with fake players that this machine can play, and what its control plane took: what the simulation is held against."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from spin_ray.bench.common import cpu_seconds
from spin_ray.bench.day import Setup
from spin_ray.bench.scale import HOURS, SCORES_PER_SAMPLE, play, settings, speeds
from spin_ray.config import load_config
from spin_ray.manifest import RunDir
from spin_ray.timeline import iteration_windows, read_spans

LOOK_S = 1.0
NUM_ITERATIONS = 2


def play_here(folder: Path, replicas: int, workers: int, *, seconds_per_hour: float, prompts: int) -> tuple[Setup, Counter[str], float]:
    """The same run for the simulation; CPU seconds of each kind of process from the first play to the last step; and how long that was.

    Ray is up.
    """
    generation, trainings = HOURS["paper"]
    training_s = [hours * seconds_per_hour for hours in trainings]
    speed, rates = speeds(prompts, generation * seconds_per_hour, training_s, replicas)
    config, _ = load_config("conf/demo.yaml", [
        *settings(folder, f"{replicas}x{workers}"), f"sampler.num_replicas={replicas}", f"learner.num_workers={workers}",
    ])
    run = RunDir.open(config)
    with _looking() as looks:
        play(config, run, speed, rates, prompts)
    windows = iteration_windows(read_spans(run.path))
    begin, end = windows[0][0], windows[NUM_ITERATIONS - 1][1]
    setup = Setup(
        replicas, workers, prompts, drawn_per_s=speed, scored_per_s=SCORES_PER_SAMPLE * speed, trained_per_s=rates[0],
        batch_pairs=config.learner.batch_pairs,
        block_prompts=config.sampler.block_prompts, epochs=2, room=config.sampler.max_num_seqs, iterations=NUM_ITERATIONS,
    )
    return setup, _between(looks, begin, end), end - begin


@contextmanager
def _looking() -> Iterator[list[tuple[float, Counter[str]]]]:
    """While the body runs, (time, CPU seconds by kind of process) again and again."""
    looks, over = [], threading.Event()

    def look() -> None:
        while not over.is_set():
            looks.append((time.time(), cpu_seconds()))
            over.wait(LOOK_S)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    yield looks
    over.set()
    looking.join()


def _between(looks: list[tuple[float, Counter[str]]], begin: float, end: float) -> Counter[str]:
    """What was taken from begin to end; between two looks a straight line."""
    times = [when for when, _ in looks]
    found: Counter[str] = Counter()
    for kind in {kind for _, seconds in looks for kind in seconds}:
        values = np.maximum.accumulate([seconds[kind] for _, seconds in looks])  # what has ended is not there any more
        found[kind] = float(np.interp(end, times, values) - np.interp(begin, times, values))
    return found
