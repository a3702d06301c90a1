"""The page itself: sections put together with their style and script, in one file that asks the network for nothing.

The policy in its head lets the browser run this script and this style and nothing else, so even markup that had got through would not act.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

from spin_ray.look.report import compare, parts
from spin_ray.look.report.lanes import timeline
from spin_ray.look.report.samples import Samples
from spin_ray.look.report.story import Story

FOLDER = Path(__file__).parent
ONE = (
    ("verdict", "Verdict"), ("versions", "Versions"), ("benchmarks", "Benchmarks"), ("training", "Training"), ("timeline", "Timeline"),
    ("cost", "Cost"), ("samples", "Answers"), ("settings", "Settings"), ("provenance", "Made from"), ("software", "Software"),
)
SEVERAL = (
    ("runs", "Runs"), ("map", "Map"), ("differences", "Differences"), ("versions", "Versions"), ("benchmarks", "Benchmarks"),
    ("training", "Training"), ("samples", "Answers"), ("each", "Each run"),
)
"""Sections, and what the links at the top call them; one that is not there has none."""


def page_of_one(story: Story, samples: Samples, complaint: str = "") -> str:
    """A run's page. `complaint`: why there are no samples."""
    body = (
        parts.head(story) + parts.versions(story) + parts.benchmarks([story]) + parts.training([story])
        + parts.section("timeline", "Timeline", timeline(story)) + parts.section("cost", "Cost of an iteration", parts.cost(story))
        + parts.samples(samples, complaint) + parts.made_of(story)
    )
    return _page(story.name, f"{story.method}, {story.state}", ONE, body)


def page_of_several(title: str, stories: Sequence[Story], samples: Samples, complaint: str = "") -> str:
    """Runs side by side: of a search, of a study, or any."""
    body = (
        compare.runs(stories) + compare.search_map(stories) + compare.differences(stories)
        + parts.section("versions", "Versions", parts.held_out_charts(stories)) + parts.benchmarks(stories) + parts.training(stories)
        + parts.samples(samples, complaint) + compare.each(stories)
    )
    return _page(title, f"{len(stories)} runs side by side", SEVERAL, body)


def _page(title: str, subtitle: str, names: Sequence[tuple[str, str]], body: str) -> str:
    style, script = _asset("report.css"), _asset("report.js")
    own = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"default-src 'none'; {own}; img-src data:; base-uri 'none'; form-action 'none'"
    links = "".join(f'<a href="#{name}">{label}</a>' for name, label in names if f'id="{name}"' in body)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} – spin_ray</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{links}</nav></header><main>{body}</main>"
        f"<footer>Written by spin_ray, {when}. What the metrics mean: docs/metrics.md.</footer><script>{script}</script></body></html>"
    )


@cache
def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
