"""What a run comes to: three sentences with their numbers. Plain functions of what the run has measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from spin_ray.config import SpinConfig
from spin_ray.look.report.costs import costs
from spin_ray.look.report.story import Story

BOTH_WAIT = 0.25
"""Share of the time from which on both players wait for each other's start, or for weights, more than for each other's work."""
ALIKE = 0.1
"""Two such shares differ by less."""
SURE = 2.0
"""Standard errors from which on a difference counts."""
CHANCE = 0.5
NEARLY_ALL = 0.9
"""Share of answers that are the real ones from which on hardly a pair has two answers."""
METRICS = (
    ("exact_match_t1_share", "exact_match_t1_change_share", "share of right held-out answers", True),
    ("real_nll_nats_per_token", "real_nll_change_nats_per_token", "held-out NLL of the real answers (nats per token)", False),
)
"""Metric, its change since theta_0, what it is called, whether more is better: the first that was measured counts."""


def verdict(story: Story) -> list[str]:
    """Is the model better, is there more to gain, what did it cost?"""
    return [better(story), more_to_gain(story), cost(story)]


def better(story: Story) -> str:
    if not story.iterations:
        return "No iteration has ended yet, so there is nothing to judge."
    measured = story.evaluations
    row = next((row for row in METRICS if math.isfinite(measured.get(0, {}).get(row[0], math.nan))), None)
    versions = {v: metrics for v, metrics in measured.items() if v and row and math.isfinite(metrics.get(row[0], math.nan))}
    if row is None or not versions:
        return _by_training(story)
    metric, change, what, more = row
    best = max(versions, key=lambda number: versions[number][metric] * (1 if more else -1))
    then, now, error = measured[0][metric], versions[best][metric], _error(versions[best], measured[0], metric, change)
    judged = _judged((now - then) * (1 if more else -1), error, len(versions))
    errors = f", ± {error:.3f}" if error is not None else ", its error is not known"
    last = max(measured)
    others = "" if best == last else f"; the last version, theta_{last}, has {measured[last].get(metric, math.nan):.3f}"
    return f"theta_{best} {judged} {story.first_name}: {what} {then:.3f} → {now:.3f} ({now - then:+.3f}{errors}){others}."


def _error(best: Mapping[str, float], first: Mapping[str, float], metric: str, change: str) -> float | None:
    """Of the change; where it was not measured prompt by prompt, as if the prompts had been different ones. None: it is not known."""
    both = [metrics.get(f"{metric}_se") for metrics in (best, first)]
    return best.get(f"{change}_se", None if None in both else math.hypot(*both))


def _judged(gain: float, error: float | None, num_versions: int) -> str:
    """`gain`: of the best of so many versions."""
    if error is None:
        return "cannot be told from" if gain == 0 else f"looks {'better' if gain > 0 else 'worse'} than"
    if not abs(gain) > (sure(num_versions) if gain > 0 else SURE) * error:
        return "is not measurably different from"
    return "is better than" if gain > 0 else "is worse than"


def sure(count: int) -> float:
    """Standard errors that the best of `count` must exceed to be as sure as one is with SURE: 1 -> 2.0, 4 -> 2.53, 20 -> 3.05.

    The best of many was picked for its luck too (Bonferroni).
    """
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-SURE) / count)


def _by_training(story: Story) -> str:
    last = story.iterations[-1]
    accuracy = story.series("iteration", "last_epoch_accuracy", "iteration")[1]
    asked = "; its benchmarks are below" if story.tasks else ""
    learnt = f" In training it told the real answers apart in {accuracy[-1]:.2f} of cases." if accuracy else ""
    why = "no number of it is there yet" if story.config.get("data.eval") else "data.eval is not set"
    return f"theta_{last['iteration'] + 1} was trained, and not compared on held-out data: {why}{asked}.{learnt}"


def more_to_gain(story: Story) -> str:
    if story.end["stage"] in ("stopped", "diverged"):
        return f"The run ended because {story.end['reason'].rstrip('.')}."
    last = max(story.evaluations, default=0)
    found = story.evaluations.get(last, {})
    if not math.isfinite(found.get("advantage_accuracy", math.nan)):
        return "Whether another iteration would help cannot be said: nothing was compared on held-out data."
    accuracy, error = found["advantage_accuracy"], found["advantage_accuracy_se"]
    told = (
        f"theta_{last} tells held-out real answers from those of {story.version_name(last - 1)} in {accuracy:.2f} of cases "
        f"(± {error:.2f}; 0.5 is chance)"
    )
    return f"{told}{_what_is_left(story, found, accuracy, SURE * error)}." if story.method == "spin" else f"{told}."


def _what_is_left(story: Story, found: Mapping[str, float], accuracy: float, error: float) -> str:
    """What that means; a wide interval says nothing. As the rule of `spin.stop=equilibrium` has it."""
    if found.get("same_as_real_share", 0.0) > NEARLY_ALL:
        return f". But {found['same_as_real_share']:.0%} of its own answers are the real ones: there is little left to learn"
    if accuracy - error > CHANCE:
        return ", so those answers still differed from the real ones, and another iteration has something to learn from"
    if accuracy + error < CHANCE:
        return ": it prefers the answers that it was to avoid, so what it learnt does not hold for new prompts"
    if accuracy + error <= story.config.get("spin.stop_accuracy", SpinConfig.stop_accuracy):
        return ": there is little left to learn from another iteration"
    return ": so few prompts do not say whether another iteration would help"


def cost(story: Story) -> str:
    made = costs(story)
    if not made:
        why = "no training has ended yet" if story.laid_out[0] else "the run has no timeline"
        return f"What it cost is not known: {why}."
    seconds = sum(one.seconds for one in made)
    parts = f"{len(made)} iteration{'s' * (len(made) > 1)} took {duration(seconds)}"
    waits = np.average([one.main_player["wait"] for one in made], weights=[one.seconds for one in made])
    if story.method != "spin" or not any(one.opponents for one in made):  # samplers that only evaluate keep nobody waiting
        return f"{parts}; the main player waited {waits:.0%} of that."
    theirs = np.average([one.opponents.get("wait", 1.0) for one in made], weights=[one.seconds for one in made])
    if min(waits, theirs) > BOTH_WAIT:
        slower = "which player is the slower one cannot be told"
    elif abs(waits - theirs) <= ALIKE:
        slower = "the players are well matched"
    elif waits > theirs:
        slower = "the opponent is the slower player: more samplers would help"
    else:
        slower = "the main player is the slower player: more learner workers would help"
    return f"{parts}; the main player waited {waits:.0%} of it, the opponent {theirs:.0%}: {slower}."


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
