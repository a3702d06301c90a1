"""Both players' timeline as bars in seconds, which the page's script zooms; without it all of it is seen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from spin_ray.look.report.story import Story
from spin_ray.records import Span
from spin_ray.timeline import COLOURS, MAIN_PLAYER, merged

MOST_BARS = 4000
"""The shortest ones go first, and those that would be a quarter of a pixel wide."""
MOST_ROWS = 24
"""The main player and so many opponents less one."""
ROW_PIXELS = 28


def timeline(story: Story) -> str:
    spans, borders = story.laid_out
    if not spans:
        return "<p>Nothing has happened yet.</p>"
    end = max(span.end for span in spans)
    players = sorted({span.player for span in spans}, key=lambda name: (name != MAIN_PLAYER, len(name), name))
    shown, hidden = players[:MOST_ROWS], len(players[MOST_ROWS:])
    used = [activity for activity in COLOURS if any(span.activity == activity for span in spans)]
    bars = "".join(_bar(span, shown.index(span.player)) for span in _worth_drawing(spans, shown, used, end))
    seams = "".join(f'<line class="seam" x1="{at:.3f}" x2="{at:.3f}" y1="0" y2="{len(shown)}"/>' for at in borders)
    names = "".join(f"<li>{escape(player)}</li>" for player in shown)
    legend = "".join(f'<li><i class="a-{activity}"></i>{activity}</li>' for activity in used)
    notes = ["A dashed line: the run was resumed there."] * bool(borders) + [f"{hidden} more opponents are not shown."] * bool(hidden)
    return (
        '<p class="note">Drag to move, scroll or pinch to zoom. <button data-zoom="2">+</button><button data-zoom="0.5">−</button>'
        f'<button data-zoom="0">all</button></p><ul class="legend">{legend}</ul>'
        f'<div class="timeline"><ul class="players">{names}</ul><div class="lane"><svg data-end="{end:.3f}" data-rows="{len(shown)}" '
        f'viewBox="0 0 {end:.3f} {len(shown)}" height="{ROW_PIXELS * len(shown)}" preserveAspectRatio="none">{bars}{seams}</svg>'
        f'<div class="seconds"></div></div></div><p class="note">{" ".join(notes)}</p>'
    )


def _worth_drawing(spans: Sequence[Span], players: Sequence[str], used: Sequence[str], end: float) -> list[Span]:
    """What lies above comes last: play above the evaluation that rides on it. An activity of another version has no colour."""
    known = [span for span in spans if span.player in players and span.activity in used]
    long_enough = [span for span in merged(known) if span.end - span.begin > end / MOST_BARS / 4]
    longest = sorted(long_enough, key=lambda span: span.end - span.begin, reverse=True)[:MOST_BARS]
    order = sorted(used, key=lambda name: name in ("play", "load"))
    return sorted(longest, key=lambda span: order.index(span.activity))


def _bar(span: Span, row: int) -> str:
    title = escape(f"{span.player}: {span.activity}, iteration {span.iteration}, {span.begin:.1f} to {span.end:.1f} s")
    return (
        f'<rect class="a-{span.activity}" x="{span.begin:.3f}" width="{span.end - span.begin:.3f}" y="{row + 0.12:.2f}" height="0.76">'
        f"<title>{title}</title></rect>"
    )
