"""What an event costs a process of the control plane, in CPU seconds; pool_costs.py and loop_costs.py measure it. No Ray."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 16
"""Prompts that the pool hands to a replica at a time: that of sampler/pool.py."""


@dataclass(frozen=True)
class PoolCosts:
    """Of the SamplerPool; `_replica`: so much more for every replica that there is."""

    request: float = 0.0
    """A block asks, and is answered."""
    chunk: float = 0.0
    """Some of its prompts are handed to a replica, and answered."""
    chunk_replica: float = 0.0
    play: float = 0.0
    """One prompt of a request for an answer and for the real one's log-probs, ..."""
    sample: float = 0.0
    """... for an answer, ..."""
    score: float = 0.0
    """... for the log-probs of a given one."""
    heartbeat: float = 0.0
    """A replica that is at work is asked for a sign of life."""
    heartbeat_replica: float = 0.0
    load: float = 0.0
    """A replica loads new weights."""
    join: float = 0.0
    """A replica joins."""
    idle: float = 0.0
    """A second in which nothing happens."""
    span: float = 0.0
    """The driver is told when a chunk was played."""

    def asked(self, verb: str, prompts: int, replicas: int) -> float:
        """One request of so many prompts. Verbs: play, sample, score."""
        chunks = -(-prompts // CHUNK)
        return self.request + chunks * (self.chunk + self.chunk_replica * replicas) + prompts * getattr(self, verb)

    def heartbeats(self, busy: int, replicas: int) -> float:
        """One of each of so many replicas."""
        return busy * (self.heartbeat + self.heartbeat_replica * replicas)


@dataclass(frozen=True)
class LoopCosts:
    """Of the driver, a play process, the coordinator and a learner's rank."""

    play_block: float = 0.0
    """A play process: a block is read, asked for, written, checked."""
    play_prompt: float = 0.0
    """So much more for each of its prompts."""
    play_idle: float = 0.0
    """A second in which nothing happens."""
    driver_block: float = 0.0
    """Ray Data hands out a block and gets it back; the driver hands it on and says so."""
    driver_block_waiting: float = 0.0
    """So much more for every block in flight."""
    driver_begin: float = 0.0
    """Once for each block of a run, when its pipeline starts."""
    driver_read: float = 0.0
    """A rank fetches where a block lies: the driver owns that."""
    driver_idle: float = 0.0
    """A second of waiting, ..."""
    driver_waiting: float = 0.0
    """... and so much more for each block in flight."""
    driver_report: float = 0.0
    """An optimizer step is logged, to W&B too (offline)."""
    driver_span: float = 0.0
    coordinator_block: float = 0.0
    """A block is put there."""
    coordinator_read: float = 0.0
    """A rank hears of it."""
    coordinator_command: float = 0.0
    """A rank gets a command."""
    coordinator_report: float = 0.0
    """A rank logs a step."""
    coordinator_poll: float = 0.0
    """The driver asks what the workers have to say."""
    coordinator_idle: float = 0.0
    rank_pair: float = 0.0
    """A rank reads a pair, and keeps it on its disk for later epochs."""


@dataclass(frozen=True)
class Costs:
    pool: PoolCosts = PoolCosts()
    loop: LoopCosts = LoopCosts()


def slope(small: tuple[float, float], large: tuple[float, float]) -> float:
    """Of a line through two measured points (events, seconds); a measured cost is never negative."""
    return max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
