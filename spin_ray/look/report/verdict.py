"""What a run comes to: three sentences with their numbers. Plain functions of what the run has measured."""

from __future__ import annotations

import numpy as np

from spin_ray.look.report.costs import costs
from spin_ray.look.report.story import Story

SURE = 2.0
"""Standard errors from which on a difference counts."""
METRICS = (
    ("exact_match_t1_share", "exact_match_t1_change_share", "share of right held-out answers", True),
    ("real_nll_nats_per_token", "real_nll_change_nats_per_token", "held-out NLL of the real answers (nats per token)", False),
)
"""Metric, its change since theta_0, what it is called, whether more is better: the first that was measured counts."""


def verdict(story: Story) -> list[str]:
    """Is the model better, is there more to gain, what did it cost?"""
    return [better(story), more_to_gain(story), cost(story)]


def better(story: Story) -> str:
    versions = {number: metrics for number, metrics in story.evaluations.items() if number}
    if not story.iterations:
        return "No iteration has ended yet, so there is nothing to judge."
    if not versions or 0 not in story.evaluations:
        return _by_training(story)
    metric, change, what, more = next(row for row in METRICS if row[0] in story.evaluations[0])
    best = max(versions, key=lambda number: versions[number][metric] * (1 if more else -1))
    then, now = story.evaluations[0][metric], versions[best][metric]
    gain, error = (now - then) * (1 if more else -1), versions[best].get(f"{change}_se")
    judged = "is not measurably different from" if error is None or abs(gain) <= SURE * error else (
        "is better than" if gain > 0 else "is worse than")
    errors = f", ± {error:.3f}" if error is not None else ""
    others = "" if best == max(versions) else f"; the last version, theta_{max(versions)}, has {versions[max(versions)][metric]:.3f}"
    return f"theta_{best} {judged} {story.first_name}: {what} {then:.3f} → {now:.3f} ({now - then:+.3f}{errors}){others}."


def _by_training(story: Story) -> str:
    last = story.iterations[-1]
    accuracy = story.series("iteration", "last_epoch_accuracy", "iteration")[1]
    asked = "; its benchmarks are below" if story.tasks else ""
    learnt = f" In training it told the real answers apart in {accuracy[-1]:.2f} of cases." if accuracy else ""
    return f"theta_{last['iteration'] + 1} was trained, and not compared on held-out data: data.eval is not set{asked}.{learnt}"


def more_to_gain(story: Story) -> str:
    stopped = story.marks("stopped", "diverged", "extended")
    if stopped and stopped[-1]["stage"] != "extended":
        return f"The run ended because {stopped[-1]['reason'].rstrip('.')}."
    last = max(story.evaluations, default=0)
    found = story.evaluations.get(last, {})
    if "advantage_accuracy" not in found:
        return "Whether another iteration would help cannot be said: nothing was compared on held-out data."
    accuracy, error = found["advantage_accuracy"], found["advantage_accuracy_se"]
    told = (
        f"theta_{last} tells held-out real answers from those of {story.version_name(last - 1)} in {accuracy:.2f} of cases "
        f"(± {error:.2f}; 0.5 is chance)"
    )
    if story.method != "spin":
        return f"{told}."
    if accuracy - SURE * error > 0.5:
        return f"{told}, so its own answers still differ from the real ones, and another iteration has something to learn from."
    return f"{told}: there is little left to learn from another iteration."


def cost(story: Story) -> str:
    made = costs(story)
    if not made:
        return "What it cost is not known: the run has no timeline."
    seconds = sum(one.seconds for one in made)
    parts = f"{len(made)} iteration{'s' * (len(made) > 1)} took {duration(seconds)}"
    waits = np.average([one.main_player["wait"] for one in made], weights=[one.seconds for one in made])
    if not any(one.opponents for one in made):
        return f"{parts}; the main player waited {waits:.0%} of that."
    theirs = np.average([one.opponents.get("wait", 1.0) for one in made], weights=[one.seconds for one in made])
    slower = "the opponent is the slower player: more samplers would help" if waits > theirs + 0.1 else (
        "the main player is the slower player: more learner workers would help" if theirs > waits + 0.1 else "the players are well matched")
    return f"{parts}; the main player waited {waits:.0%} of it, the opponent {theirs:.0%}: {slower}."


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
