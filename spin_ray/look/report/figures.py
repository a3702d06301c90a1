"""Pictures as SVG text, in the page's own colours: lines with error bars, bars of shares, a map of two settings. No script, no library.

Every number that is drawn can be read: a point's tooltip is its title. Colours come from classes (report.css), so a page in the dark, or
on paper, has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
MOST_POINTS = 240
"""Of a line: a longer one is thinned, each point the mean of those around it."""
NUM_COLOURS = 8


@dataclass(frozen=True)
class Line:
    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()
    """Standard errors; none where they are not known."""
    notes: Sequence[str] = field(default=())
    """What a point's tooltip says beside its numbers."""


def thinned(line: Line) -> Line:
    """At most MOST_POINTS, each the mean of its neighbours."""
    size = -(-len(line.xs) // MOST_POINTS)
    if size <= 1:
        return line
    parts = range(0, len(line.xs), size)
    mean = lambda values: [sum(values[k : k + size]) / len(values[k : k + size]) for k in parts]  # noqa: E731
    return Line(line.label, mean(line.xs), mean(line.ys))


def chart(title: str, lines: Sequence[Line], x_label: str, *, marks: bool = False, level: float | None = None) -> str:
    """Lines over one axis; `marks`: a dot at every point; `level`: a dashed line across, such as chance. "" where nothing is finite."""
    lines = [_finite(thinned(line)) for line in lines]
    lines = [line for line in lines if line.xs]
    if not lines:
        return ""
    errors = [[error if math.isfinite(error) else 0.0 for error in line.errors or [0.0] * len(line.ys)] for line in lines]
    highs = [y + e for line, own in zip(lines, errors, strict=True) for y, e in zip(line.ys, own, strict=True)]
    lows = [y - e for line, own in zip(lines, errors, strict=True) for y, e in zip(line.ys, own, strict=True)]
    xs = [x for line in lines for x in line.xs]
    across, up = _scale(xs, LEFT, WIDTH - RIGHT), _scale([*lows, *highs, *([] if level is None else [level])], HEIGHT - BOTTOM, TOP)
    whole = all(float(x).is_integer() for x in xs) and max(xs) - min(xs) <= 12
    parts = [_axes(across, up, x_label, ticks(min(xs), max(xs), whole=whole), ticks(up.low, up.high))]
    if level is not None:
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(level):.1f}" y2="{up(level):.1f}"/>')
    parts += [_line(number, line, across, up, marks=marks) for number, line in enumerate(lines)]
    legend = _legend([line.label for line in lines]) if len(lines) > 1 else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>{legend}</figure>'
    )


def _finite(line: Line) -> Line:
    kept = [k for k, y in enumerate(line.ys) if y is not None and math.isfinite(y)]
    pick = lambda values: [values[k] for k in kept] if len(values) == len(line.ys) else []  # noqa: E731
    return Line(line.label, pick(line.xs), pick(line.ys), pick(line.errors), pick(line.notes))


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def _scale(values: Sequence[float], begin: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - max(abs(low), 1e-9) * 0.1, high + max(abs(high), 1e-9) * 0.1
    room = 0.05 * (high - low)
    return _Scale(low - room, high + room, begin, end)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to seven round numbers from `low` to `high`; whole ones on request. ticks(0, 1) -> [0, 0.2, ... 1]."""
    if whole:
        step = max(1, math.ceil((high - low) / 8))
        return [float(x) for x in range(math.ceil(low), math.floor(high) + 1, step)]
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def shown(value: float) -> str:
    """A number as people write it."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}"


def _axes(across: _Scale, up: _Scale, x_label: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    bottom = HEIGHT - BOTTOM
    parts = []
    for y in ys:
        at = up(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{shown(y)}</text>')
    for x in xs:
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 16}" text-anchor="middle">{shown(x)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="what" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _line(number: int, line: Line, across: _Scale, up: _Scale, *, marks: bool) -> str:
    colour = _colour(number)
    places = [(across(x), up(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    parts = [f'<polyline class="line {colour}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
    if line.errors:
        for (x, _), value, error in zip(places, line.ys, line.errors, strict=True):
            if not math.isfinite(error):  # only the tooltip can show it
                continue
            low, high = up(value - error), up(value + error)
            parts.append(f'<line class="error {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    if marks or len(places) == 1:
        for k, (x, y) in enumerate(places):
            error = f" ± {shown(line.errors[k])}" if line.errors else ""
            note = f": {line.notes[k]}" if line.notes else ""
            title = escape(f"{line.label} at {shown(line.xs[k])}: {shown(line.ys[k])}{error}{note}")
            parts.append(f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
    return "".join(parts)


def _colour(number: int) -> str:
    """Class of the line with this number."""
    return f"c{number % NUM_COLOURS}" + " dashed" * (number // NUM_COLOURS % 2)


def _legend(labels: Sequence[str]) -> str:
    entries = "".join(f'<li><i class="{_colour(k)}"></i>{escape(label)}</li>' for k, label in enumerate(labels))
    return f'<ul class="legend">{entries}</ul>'


@dataclass(frozen=True)
class Place:
    """A run on a map of two settings."""

    x: float
    y: float
    value: float | None
    """None: it has no number, because it collapsed or was not evaluated."""
    label: str
    bad: bool = False


def settings_map(title: str, places: Sequence[Place], x_label: str, y_label: str, *, higher_is_better: bool) -> str:
    """Runs over two settings, better ones darker; one that collapsed is a cross. Axes are logarithmic where all values are above 0."""
    bottom = HEIGHT - BOTTOM
    to_x, to_y = (_axis_of([getattr(place, name) for place in places]) for name in "xy")
    across = _scale([to_x(place.x) for place in places], LEFT + 20, WIDTH - RIGHT)
    up = _scale([to_y(place.y) for place in places], bottom - 26, TOP)
    known = [place.value for place in places if place.value is not None and not place.bad]
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    for y in _few(sorted({place.y for place in places})):
        parts.append(f'<text x="{LEFT + 8}" y="{up(to_y(y)) + 4:.1f}" text-anchor="end">{shown(y)}</text>')
    for x in _few(sorted({place.x for place in places})):
        parts.append(f'<text x="{across(to_x(x)):.1f}" y="{bottom + 16}" text-anchor="middle">{shown(x)}</text>')
    for place in places:
        share = _share(place.value, known, higher_is_better) if place.value is not None and not place.bad else None
        where = f"{x_label} {shown(place.x)}, {y_label} {shown(place.y)}"
        parts.append(_place(place, across(to_x(place.x)), up(to_y(place.y)), share, where))
    what = escape(f"{x_label} (across), {y_label} (up)")
    parts.append(f'<text class="what" x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{what}</text>')
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _place(place: Place, x: float, y: float, share: float | None, where: str) -> str:
    """`share`: how good it is among the others, 0 to 1; None: it has no number that counts."""
    value = "collapsed" if place.bad else "no number" if place.value is None else shown(place.value)
    title = f"<title>{escape(f'{place.label}: {where}: {value}')}</title>"
    if share is None:
        return f'<path class="cross" d="M{x - 7:.1f} {y - 7:.1f}l14 14m0 -14l-14 14">{title}</path>'
    return (
        f'<circle class="place" cx="{x:.1f}" cy="{y:.1f}" r="10" fill-opacity="{0.15 + 0.85 * share:.2f}">{title}</circle>'
        f'<text class="value" x="{x:.1f}" y="{y + 22:.1f}" text-anchor="middle">{value}</text>'
    )


def _axis_of(values: Sequence[float]) -> Callable[[float], float]:
    return math.log10 if min(values) > 0 and max(values) > 3 * min(values) else float


def _few(values: Sequence[float]) -> Sequence[float]:
    return values if len(values) <= 7 else values[:: -(-len(values) // 6)]


def _share(value: float, known: Sequence[float], higher_is_better: bool) -> float:
    low, high = min(known), max(known)
    share = (value - low) / (high - low) if high > low else 1.0
    return share if higher_is_better else 1 - share
