"""Where the time of an iteration went: of the main player, and of the opponents on average."""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.look.report.story import Story
from spin_ray.timeline import MAIN_PLAYER, iteration_windows, shares

LEARNER = ("train", "score", "publish", "save", "rest", "sleep", "wake")
SAMPLERS = ("play", "load", "audit", "sleep", "wake", "rest", "evaluate")
"""Activities; of two at once the first counts."""
SYNC = ("publish", "save", "load", "audit", "sleep", "wake", "rest")
"""What has to do with handing weights, or devices, on."""


@dataclass(frozen=True)
class Cost:
    """One iteration."""

    iteration: int
    seconds: float
    main_player: dict[str, float]
    """train, score, sync, wait: shares of the time."""
    opponents: dict[str, float]
    """play, evaluate, sync, wait, on average over replicas; empty where nothing is played or evaluated."""


def costs(story: Story) -> list[Cost]:
    """Of all iterations whose training has ended; an iteration goes from the end of the training before it to the end of its own."""
    spans, _ = story.laid_out
    if not any(span.activity == "train" for span in spans):
        return []
    made = []
    for t, (begin, end) in iteration_windows(spans).items():
        here = [span for span in spans if span.end > begin and span.begin < end]
        others = sorted({span.player for span in here} - {MAIN_PLAYER})  # another session may have had more of them
        learner = _grouped(shares(here, [MAIN_PLAYER], begin, end, LEARNER), ("train", "score"))
        samplers = _grouped(shares(here, others, begin, end, SAMPLERS), ("play", "evaluate")) if others else {}
        made.append(Cost(t, end - begin, learner, samplers))
    return made


def _grouped(found: dict[str, float], own: tuple[str, ...]) -> dict[str, float]:
    return {**{name: found[name] for name in own}, "sync": sum(found.get(name, 0.0) for name in SYNC), "wait": found["wait"]}
