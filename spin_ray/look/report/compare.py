"""Runs side by side: which is better, in what they differ, and over two settings a map."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from spin_ray.heldout import has_collapsed
from spin_ray.look.report import parts
from spin_ray.look.report.figures import Place, settings_map, shown
from spin_ray.look.report.lanes import timeline
from spin_ray.look.report.samples import Samples
from spin_ray.look.report.story import Story, differing
from spin_ray.look.report.verdict import METRICS, verdict


def _metric(stories: Sequence[Story]) -> tuple[str, str, bool] | None:
    """The first metric that all evaluated runs have: name, what it is called, whether more is better."""
    evaluated = [story for story in stories if len(story.evaluations) > 1]
    for name, _, what, more in METRICS if evaluated else ():
        if all(name in metrics for story in evaluated for metrics in story.evaluations.values()):
            return name, what, more
    return None


def best_of(story: Story, name: str, more: bool) -> tuple[int, float] | None:
    """(version, value) of the best version after theta_0."""
    found = {v: metrics[name] for v, metrics in story.evaluations.items() if v and name in metrics}
    return max(found.items(), key=lambda entry: entry[1] if more else -entry[1], default=None)


def runs(stories: Sequence[Story]) -> str:
    metric = _metric(stories)
    rows = []
    for story in stories:
        found = best_of(story, metric[0], metric[2]) if metric else None
        value = f"{shown(found[1])} (theta_{found[0]})" if found else "–"
        rows.append([story.name, story.state, value, verdict(story)[0]])
    if metric:
        order = {story.name: best_of(story, metric[0], metric[2]) for story in stories}
        worst = float("-inf") if metric[2] else float("inf")
        rows.sort(key=lambda row: (order[row[0]] or (0, worst))[1], reverse=metric[2])
    what = f"best version's {metric[1]}" if metric else "held-out"
    return parts.section("runs", "Runs", parts.table(["run", "state", what, "verdict"], rows))


def search_map(stories: Sequence[Story]) -> str:
    """The best number of every run over the first two settings with numbers that differ. Nothing for fewer than three runs."""
    metric, differ = _metric(stories), differing(stories)
    axes = [key for key, values in differ.items() if all(type(value) in (int, float) for value in values) and key != "run.seed"]
    axes.sort(key=lambda key: (key not in ("spin.lr", "dpo.lr", "sft.lr"), key not in ("spin.beta", "dpo.beta")))
    if not metric or len(axes) < 2 or len(stories) < 3:
        return ""
    places = []
    for k, story in enumerate(stories):
        found, bad = best_of(story, metric[0], metric[2]), collapsed(story)
        places.append(Place(differ[axes[0]][k], differ[axes[1]][k], found and found[1], story.name, bad))
    title = f"{metric[1]}, best version of each run; a cross has collapsed"
    return parts.section("map", "Map", settings_map(title, places, axes[0], axes[1], higher_is_better=metric[2]))


def collapsed(story: Story) -> bool:
    """Whether its numbers went bad, or its last version is far worse than its first."""
    return bool(story.marks("diverged")) or has_collapsed(story.evaluations)


def differences(stories: Sequence[Story]) -> str:
    differ = differing(stories)
    if not differ:
        return parts.section("differences", "Differences", "<p>All settings are the same.</p>")
    rows = [[key, *map(parts.say, values)] for key, values in differ.items()]
    return parts.section("differences", "Differences", parts.table(["setting", *(story.name for story in stories)], rows))


def each(stories: Sequence[Story]) -> str:
    """Every run's own sections, folded; their answers are in the table of all."""
    folded = []
    for story in stories:
        sentences = "".join(f"<p>{escape(text)}</p>" for text in verdict(story))
        body = sentences + timeline(story) + parts.cost(story)
        folded.append(f"<details><summary>{escape(story.name)}: {escape(story.state)}</summary>{body}</details>")
    return parts.section("each", "Each run", "".join(folded))


def side_by_side(stories: Sequence[Story], samples: Sequence[Samples]) -> tuple[Samples, str]:
    """One table: the answers of each run's newest version to the same prompts; or why there is none."""
    having = [(story, own) for story, own in zip(stories, samples, strict=True) if own.rows]
    if not having:
        return Samples("", [], []), ""
    first = having[0][1]
    prompts = {row["prompt"]: row for row in first.rows}
    common = [p for p in prompts if all(any(row["prompt"] == p for row in own.rows) for _, own in having)]
    if not common:
        return Samples("", [], []), "These runs have answered different prompts."
    by_prompt = [{row["prompt"]: row for row in own.rows} for _, own in having]
    rows = [{**prompts[p], "answers": [own[p]["answers"][-1] for own in by_prompt]} for p in common]
    return Samples(first.source, [f"{story.name}, {own.versions[-1]}" for story, own in having], rows), ""
