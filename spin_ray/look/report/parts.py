"""The sections of a run's page, each a piece of HTML. What comes from a run is escaped here, text by text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from spin_ray.look.report.costs import costs
from spin_ray.look.report.figures import Line, chart, shown
from spin_ray.look.report.samples import Samples
from spin_ray.look.report.story import Story
from spin_ray.look.report.verdict import duration, verdict
from spin_ray.look.report.warnings import warnings

HELD_OUT = (
    ("exact_match_t1_share", "Right answers, T = 1 (share)", None), ("exact_match_greedy_share", "Right answers, greedy (share)", None),
    ("real_nll_nats_per_token", "NLL of the real answers (nats per token)", None),
    ("advantage_accuracy", "Real answers told from the version before's (share)", 0.5),
    ("generated_tokens", "Length of answers (tokens)", None), ("kl_from_start_nats_per_token", "KL from theta_0 (nats per token)", 0.0),
    ("same_as_real_share", "Answers that are the real one (share)", None),
)
"""Metric, what its picture is called, a level to compare with."""
TRAINING = (
    ("pair_loss", "Loss of pairs"), ("margin", "Margin"), ("accuracy", "Real answers told apart (share)"),
    ("real_logp_change_nats", "Change of log p(y) (nats per answer)"),
    ("generated_logp_change_nats", "Change of log p(y') (nats per answer)"),
    ("real_nll_nats_per_token", "NLL of the real answers (nats per token)"), ("grad_norm", "Norm of the gradient"), ("lr", "Learning rate"),
    ("pairs_per_s", "Pairs per second"), ("waited_s", "Waited since the iteration's start (s)"),
)


def head(story: Story) -> str:
    sentences = "".join(f"<p>{escape(text)}</p>" for text in verdict(story))
    found = warnings(story)
    listed = "".join(f"<li>{escape(text)}</li>" for text in found) or "<li class=none>none</li>"
    return section("verdict", "Verdict", f'<div class="verdict">{sentences}</div><h3>Warnings</h3><ul class="warnings">{listed}</ul>')


def versions(story: Story) -> str:
    """Table and curves of the held-out numbers."""
    found = story.evaluations
    if not found:
        return section("versions", "Versions", "<p>Nothing was measured on held-out data: data.eval is not set, or nothing is ready.</p>")
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics if not name.endswith("_se")))
    rows = [[story.version_name(v), *(_with_error(metrics, name) for name in names)] for v, metrics in found.items()]
    best = story.best
    text = f"<p>Best by its held-out numbers: <code>{escape(best)}</code></p>" if best else ""
    return section("versions", "Versions", held_out_charts([story]) + table(["version", *names], rows) + text)


def held_out_charts(stories: Sequence[Story]) -> str:
    charts = []
    for name, title, level in HELD_OUT:
        lines = [_over_versions(story, name) for story in stories]
        charts.append(chart(title, [line for line in lines if line.xs], "version of the model", marks=True, level=level))
    return f'<div class="charts">{"".join(charts)}</div>'


def _over_versions(story: Story, name: str) -> Line:
    those = {v: metrics for v, metrics in story.evaluations.items() if name in metrics}
    errors = [metrics[f"{name}_se"] for metrics in those.values() if f"{name}_se" in metrics]
    ys = [metrics[name] for metrics in those.values()]
    return Line(story.name, list(those), ys, errors if len(errors) == len(ys) else (), [story.version_name(v) for v in those])


def benchmarks(stories: Sequence[Story]) -> str:
    """What versions got on benchmarks that everybody knows; nothing where none was asked."""
    asked = list(dict.fromkeys(
        (task, name) for story in stories for numbers in story.tasks.values() for task, metrics in numbers.items() for name in metrics
        if not name.endswith("_se") and name != "num_docs"
    ))
    if not asked:
        return ""
    charts = [chart(f"{task}: {name}", [_of_task(story, task, name) for story in stories], "version of the model", marks=True)
              for task, name in asked]
    rows = [
        [*([story.name] if len(stories) > 1 else []), story.version_name(v), *(_with_error(numbers.get(t, {}), n) for t, n in asked)]
        for story in stories for v, numbers in story.tasks.items()
    ]
    names = [*(["run"] if len(stories) > 1 else []), "version", *(f"{task} {name}" for task, name in asked)]
    return section("benchmarks", "Benchmarks", f'<div class="charts">{"".join(charts)}</div>' + table(names, rows))


def _of_task(story: Story, task: str, name: str) -> Line:
    those = {v: numbers[task] for v, numbers in story.tasks.items() if name in numbers.get(task, {})}
    errors = [metrics[f"{name}_se"] for metrics in those.values() if f"{name}_se" in metrics]
    return Line(story.name, list(those), [metrics[name] for metrics in those.values()], errors if len(errors) == len(those) else ())


def _with_error(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    error = metrics.get(f"{name}_se")
    return shown(metrics[name]) + (f" ± {shown(error)}" if error is not None else "")


def training(stories: Sequence[Story]) -> str:
    charts = []
    for name, title in TRAINING:
        lines = [Line(story.name, *story.steps(name)) for story in stories]
        charts.append(chart(title, [line for line in lines if len(line.xs) > 0], "optimizer step"))
    body = "".join(charts)
    return section("training", "Training", f'<div class="charts">{body}</div>' if body else "<p>No step has been taken yet.</p>")


def cost(story: Story) -> str:
    made = costs(story)
    if not made:
        return "<p>No iteration has ended yet.</p>"
    rows = []
    for one in made:
        rows.append([f"{one.iteration}", duration(one.seconds), *_spent(one.main_player, one.seconds, ("train", "score", "sync", "wait")),
                     *_spent(one.opponents, one.seconds, ("play", "evaluate", "sync", "wait"))])
    total = sum(one.seconds for one in made)
    names = ["iteration", "time", "train", "score", "sync", "wait", "play", "evaluate", "sync", "wait"]
    groups = '<tr><th colspan="2"></th><th colspan="4">main player</th><th colspan="4">opponents, on average</th></tr>'
    note = (
        f"<p>All iterations together: {duration(total)}. An iteration is from the end of one training to the end of the next; "
        "sync: weights on their way.</p>"
    )
    return table(names, rows, before=groups) + note


def _spent(shares: dict[str, float], seconds: float, names: Iterable[str]) -> list[str]:
    return [f"{shares[name] * seconds:.1f} s, {shares[name]:.0%}" if shares else "–" for name in names]


def samples(found: Samples, complaint: str = "") -> str:
    """The table is filled by the page's script, from JSON: text of a model or of a row is never markup."""
    if complaint or not found.rows:
        return section("samples", "Answers", f"<p>{escape(complaint or 'No answers are kept.')}</p>")
    choices = "".join(f'<label><input type="checkbox" checked data-version="{k}">{escape(v)}</label>' for k, v in enumerate(found.versions))
    data = json.dumps({"versions": found.versions, "rows": found.rows}, ensure_ascii=False, separators=(",", ":"))
    return section("samples", "Answers", (
        f"<p>{len(found.rows)} {escape(found.source)}. A token is <span class=more>green</span> where the training that followed made it "
        "more likely, and <span class=less>red</span> where less (a real answer: by the newest version against theta_0).</p>"
        '<p class="filters"><input type="search" id="search" placeholder="search in prompts and answers" aria-label="search">'
        '<select id="filter" aria-label="filter"><option value="all">all</option><option value="changed">answers that changed</option>'
        '<option value="right">last answer is the real one</option><option value="wrong">last answer is not the real one</option></select>'
        f'{choices}<span id="count"></span></p><div id="rows"></div><p><button id="more">show more</button></p>'
        f'<script type="application/json" id="samples-data">{data.replace("<", chr(92) + "u003c")}</script>'
    ))


def made_of(story: Story) -> str:
    """Settings that are not the defaults, inputs, software, hardware."""
    changed = table(["setting", "default", "this run"], [[key, say(was), say(value)] for key, (was, value) in story.changed.items()])
    session = story.session
    facts = {**{f"{name}": version for name, version in session.get("packages", {}).items()}, "python": session.get("python", "–"),
             "revision of spin_ray": session.get("revision") or "–"}
    hardware = session.get("hardware", {})
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(session["started"])) if "started" in session else "–"
    what = {**hardware, "sessions": len(story.marks("session")), "last one started": started}
    return (
        section("settings", "Settings that are not the defaults", changed)
        + section("provenance", "What it was made from", table(["of", "what", "SHA-256"], _inputs(story)))
        + section("software", "Software and hardware", table(["what", "version"], [[key, say(value)] for key, value in facts.items()])
                  + table(["what", "value"], [[key, say(value)] for key, value in what.items()]))
    )


def _inputs(story: Story) -> list[list[str]]:
    prepared, first = ((story.marks(stage) or [{}])[-1] for stage in ("prepared", "theta_0"))
    count = (prepared.get("lengths") or {}).get("num_prompts", "–")
    rows = [
        ["prompts", f"{story.config.get('data.train')}: {count} prompts", prepared.get("sha256", "–")],
        ["chat template", say(story.config.get("model.chat_template") or "the tokenizer's own"), story.session.get("template", "–")],
        ["theta_0", story.session.get("model", say(story.config.get("model.path"))), first.get("sha256", "–")],
    ]
    for mark in story.iterations:
        pairs = mark.get("pairs", {})
        rows.append([f"pairs of iteration {mark['iteration']}", f"{pairs.get('new', '–')} new ones, written by {mark.get('opponent', '–')}",
                     pairs.get("sha256", "–")])
    return rows


def table(names: Sequence[str], rows: Iterable[Sequence[str]], before: str = "") -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead>{before}<tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def say(value: Any) -> str:
    """A setting's value for people."""
    if value in (None, "", [], {}):
        return "–"
    return shown(value) if isinstance(value, float) else str(value)
