"""What the sampler pool's process takes for each of its events, in CPU seconds: the real actor between fake askers and fake replicas."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from spin_ray.bench.common import Meter, cpu_seconds, idle_shares
from spin_ray.bench.costs import PoolCosts, slope
from spin_ray.bench.scale import start_fakes
from spin_ray.bench.stand_ins import SETTINGS, TOKENS, Asker
from spin_ray.records import PublishedWeights, Span, Version
from spin_ray.sampler.fake import FleetMember
from spin_ray.sampler.pool import CHUNK, HEARTBEAT_S, Limits, start_pool

FEW, MANY = 8, 512
"""Replicas between which what an event costs is taken for a straight line."""
BLOCK = 256
"""Prompts of a block, as in the paper's recipe."""
BUCKETS = 58
"""Of 7B parameters in bfloat16."""


def measure_pool() -> PoolCosts:
    """Half a minute on two free cores."""
    with _pool(FEW) as (_, ask, few_started):
        ask("play", CHUNK, 64)  # the first ones open connections
        idle = idle_shares()
        one, chunk = (_each(lambda size=size: ask("play", size, 300), 300) for size in (1, CHUNK))
        block = {verb: _each(lambda verb=verb: ask(verb, BLOCK, 30), 30) for verb in ("play", "sample", "score")}
    with _pool(MANY) as (pool, ask, many_started):
        ask("play", BLOCK, 4)
        spread = _each(lambda: ask("play", BLOCK, 30), 30)
        load = _each(lambda: _load(pool, 2), 2 * MANY)
    few_beats, many_beats = (_heartbeat(count) for count in (FEW * FEW, MANY))
    chunks, prompt = BLOCK // CHUNK, slope((1, one), (CHUNK, chunk))
    per_chunk = slope((1, chunk), (chunks, block["play"] - (BLOCK - CHUNK) * prompt))
    per_request = max(0.0, one - per_chunk - prompt)
    per_prompt = {verb: max(0.0, (seconds - per_request - chunks * per_chunk) / BLOCK) for verb, seconds in block.items()}
    beat_replica = slope((FEW * FEW, few_beats), (MANY, many_beats))
    return PoolCosts(
        request=per_request, chunk=per_chunk, chunk_replica=slope((FEW, block["play"]), (MANY, spread)) / chunks, **per_prompt,
        heartbeat=max(0.0, few_beats - FEW * FEW * beat_replica), heartbeat_replica=beat_replica,
        load=load, idle=idle["SamplerPool"], join=slope((FEW, few_started), (MANY, many_started)), span=_span_to_send(),
    )


@contextmanager
def _pool(count: int, speed: float = 1e6, heartbeat_s: float = math.inf) -> Iterator[tuple[Any, Callable[..., None], float]]:
    """A pool of so many fake replicas, who asks it, and the CPU seconds that its start took."""
    fakes = start_fakes(count, speed, answer_tokens=TOKENS, per_process=MANY // 2)
    ray.get([fake.ready.remote() for fake in fakes])
    pool = start_pool(fakes, Version(0), Limits(BLOCK, heartbeat_timeout_s=heartbeat_s), FleetMember.end)
    ray.get(pool.ready.remote(count))
    started = cpu_seconds()["SamplerPool"]
    ray.get(pool.release.remote(Version(0)))
    asker = ray.remote(num_cpus=0)(Asker).remote(pool)
    yield pool, lambda verb, size, number: ray.get(asker.ask.remote(verb, size, number, 16)), started
    for process in (pool, asker):
        ray.kill(process)
    for fake in fakes[:: MANY // 2]:
        fake.end()


def _each(work: Callable[[], Any], count: int, idle: Mapping[str, float] = {}) -> float:
    """CPU seconds of the pool for one of so many."""
    meter = Meter(idle)
    work()
    return meter.each(count)["SamplerPool"]


def _load(pool: Any, times: int) -> None:
    buckets = tuple(ray.put(None) for _ in range(BUCKETS))
    for number in range(1, 1 + times):
        ray.get(pool.load.remote(PublishedWeights(Version(number), buckets, 0)))


def _heartbeat(replicas: int) -> float:
    """CPU seconds for one, while every replica owes an answer for longer than this takes."""
    with _pool(replicas, speed=1e-3, heartbeat_s=4 * HEARTBEAT_S) as (pool, _, _):
        idle, ids = idle_shares(), [np.arange(TOKENS, dtype=np.int32)] * CHUNK
        owed = [pool.sample.remote(Version(0), ids, SETTINGS) for _ in range(replicas)]
        time.sleep(1.0)
        each = _each(lambda: time.sleep(2 * HEARTBEAT_S), 2 * replicas, idle)
        del owed
    return each


def _span_to_send() -> float:
    """In this process: a span is made and pickled."""
    begun = time.thread_time()
    pickle.dumps([Span(f"opponent {k}", "play", 1, time.time(), time.time()) for k in range(20_000)])
    return (time.thread_time() - begun) / 20_000
