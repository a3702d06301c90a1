"""How long a run takes, from rates. Arithmetic alone.

    training, s = pairs × tokens of a pair × epochs / tokens per second of the main player; its own reference counts a third of an epoch
    play, s     = new pairs × tokens of an answer / (tokens per second of a replica × replicas)  +  scores of replayed pairs
    iteration   = the longer of both where they overlap, their sum where they take turns  +  the hand-over of the weights
"""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.scaling import Rates as PerSampler
from spin_ray.scaling import needed

FORWARD_SHARE = 1 / 3
"""Of a training step's time, for a forward pass alone: 2 of 6 FLOPs a weight."""


@dataclass(frozen=True)
class Rate:
    """A number per second and where it is from."""

    value: float
    source: str
    """given, measured or assumed, with what it rests on."""


@dataclass(frozen=True)
class Speeds:
    learner: Rate
    """Tokens of packed rows per second, of all workers together."""
    sampler: Rate
    """Generated tokens per second, of one replica."""
    scorer: Rate
    """Tokens per second of one replica that only reads."""
    sync: Rate
    """Seconds to hand an iteration's weights over."""


@dataclass(frozen=True)
class Job:
    """What there is to do."""

    prompts: int
    prompt: float
    """Tokens of a prompt, on average."""
    answer: float
    generated: float
    epochs: list[int]
    """One entry per iteration."""
    replay: int
    num_eval: int
    replicas: int
    overlap: bool
    """Whether both players compute at the same time."""
    plays: bool
    alone: bool
    """Whether real answers are trained on without others."""
    scorer: str
    """Who computes the references, as in methods/; empty: nobody."""

    @property
    def pair(self) -> float:
        """Tokens in a packed row."""
        return self.prompt + self.answer - 1 + (0 if self.alone else self.generated - 1)


@dataclass(frozen=True)
class Iteration:
    """Seconds."""

    number: int
    pairs: int
    train_s: float
    play_s: float
    """Of all replicas side by side."""
    evaluate_s: float
    sync_s: float
    wall_s: float
    replicas_needed: float
    """That keep play just hidden behind training; 0 where nothing is played, or both take turns."""


def iterations(job: Job, speeds: Speeds) -> list[Iteration]:
    return [_iteration(job, speeds, t) for t in range(len(job.epochs))]


def _iteration(job: Job, speeds: Speeds, t: int) -> Iteration:
    replayed = min(t, job.replay) * job.prompts
    pairs = job.prompts + replayed
    passes = job.epochs[t] + (FORWARD_SHARE if job.scorer in ("frozen", "learner") else 0.0)
    train = pairs * job.pair * passes / speeds.learner.value
    one = play_s(job, speeds, replayed)
    play = one / job.replicas if job.plays else 0.0
    evaluate = job.num_eval * (job.generated / speeds.sampler.value + (job.prompt + job.answer) / speeds.scorer.value) / job.replicas
    wall = (max(train, play + evaluate) if job.overlap else train + play + evaluate) + speeds.sync.value * job.plays
    return Iteration(t, pairs, train, play, evaluate, speeds.sync.value * job.plays, wall, _needed(job, one, train, pairs))


def play_s(job: Job, speeds: Speeds, replayed: int) -> float:
    """Of one replica: new answers, the scores of their real ones, and those of replayed pairs."""
    scored = (job.prompts * job.answer + replayed * job.pair) / speeds.scorer.value if job.scorer == "opponent" else 0.0
    return job.prompts * job.generated / speeds.sampler.value + scored


def _needed(job: Job, one_s: float, train_s: float, pairs: int) -> float:
    """By scaling.py, as one kind of pair that takes what both take together."""
    if not (job.plays and job.overlap):
        return 0.0
    return needed(PerSampler(drawn=pairs / one_s, scored=0.0, trained=pairs / train_s), pairs, 0) or 0.0
