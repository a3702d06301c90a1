"""`spin-ray show`: what a run is doing, from its folder or URL, on any machine that can read it. Takes no lock and writes nothing there."""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from spin_ray.errors import BadInput
from spin_ray.look.printable import printable
from spin_ray.look.progress import Progress
from spin_ray.look.state import NEVER, RUNNING, Facts, facts_of, version_named
from spin_ray.look.stored import open_stored
from spin_ray.look.trials import Trials, trials_of
from spin_ray.terminal import COLUMNS, cell

REDRAW_S = 3.0
_SHOWN = ("loss", "pair_loss", "margin", "accuracy", "real_nll_nats_per_token", "grad_norm", "lr", "pairs_per_s", "waited_s")
"""Of a step's metrics those that are shown; --json has all."""


def show(where: str, key: str, *, follow: bool, as_json: bool) -> None:
    """The command. With `follow` until the run has ended, or Ctrl-C."""
    read = _reader(where)
    if key:
        print(_value(_plain(read()), key))
    elif as_json:
        _repeat(read, lambda facts: print(json.dumps(_plain(facts)), flush=True), follow=follow)
    elif follow and Console().is_terminal:
        with Live(console=Console(highlight=False, emoji=False), auto_refresh=False, vertical_overflow="crop") as live:
            _repeat(read, lambda facts: live.update(Text(told(facts), no_wrap=True, overflow="ellipsis"), refresh=True), follow=True)
    else:
        _repeat(read, lambda facts: print(told(facts), flush=True), follow=follow)


def _reader(where: str) -> Callable[[], Facts | Trials]:
    """Reads a run, or a folder of many. Raises BadInput for what is neither."""
    stored = open_stored(where)
    return (lambda: trials_of(stored.run.path)) if stored.on_disk and trials_of(stored.run.path) else (lambda: facts_of(open_stored(where)))


def _repeat(read: Callable[[], Any], draw: Callable[[Any], None], *, follow: bool) -> None:
    try:
        draw(facts := read())
        while follow and facts.state in (RUNNING, NEVER):
            time.sleep(REDRAW_S)
            draw(facts := read())
    except KeyboardInterrupt:
        if not follow:
            raise


def told(facts: Facts | Trials) -> str:
    """For the terminal: lines without an end of the last."""
    return printable("\n".join(_lines_of_trials(facts) if isinstance(facts, Trials) else _lines(facts)))


def _lines(facts: Facts) -> list[str]:
    progress = facts.progress
    lines = [f"{facts.run}: {facts.state}{f': {facts.why}' if facts.why else ''}"]
    if progress.begun is not None:
        begun = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(progress.begun))
        lines.append(f"  begun      {begun}, at work for {duration(progress.worked_s)}")
    if facts.newest:
        lines.append(f"  method     {facts.method}, {progress.iterations} of {progress.num_iterations} iterations finished")
    if progress.num_steps is not None:
        lines.append(f"  iteration  {progress.iterations}: step {progress.step} of {progress.num_steps}")
    if progress.num_pairs is not None:
        lines.append(f"  pairs      {progress.pairs:,} of {progress.num_pairs:,} of this iteration are played")
    if facts.state == RUNNING:
        lines.append(f"  left       {_left(progress)}")
    if shown := [f"{name} {value:.4g}" for name in _SHOWN if isinstance(value := facts.training.get(name), (int, float))]:
        lines.append(f"  last step  {', '.join(shown)}")
    if facts.newest:
        lines.append(f"  newest     theta_{progress.iterations}: {facts.newest}")
    if facts.best:
        lines.append(f"  best       theta_{version_named(facts.best)}: {facts.best}")
    lines += [f"  warning    {warning}" for warning in facts.warnings]
    if any(facts.versions.values()):
        lines += ["", *_table(facts)]
    if facts.said:
        lines += ["", "last lines that it said (UTC):", *(f"  {line}" for line in facts.said)]
    return lines


def _left(progress: Progress) -> str:
    if progress.iterations == progress.num_iterations:
        return "all is trained; the last versions are evaluated"
    return "not known yet" if progress.left_s is None else f"about {duration(progress.left_s)}"


def _table(facts: Facts) -> list[str]:
    """The run's own table, with the columns that any version has."""
    known = {name for metrics in facts.versions.values() for name in metrics}
    columns = [column for column in COLUMNS if column[0] in known or column[0] == "model"]
    lines = ["".join(f"{title:>{width}}" for _, width, title in columns)]
    for version, metrics in facts.versions.items():
        row = {"model": f"theta_{version}", **metrics}
        lines.append("".join(f"{cell(row.get(key)):>{width}}" for key, width, _ in columns))
    return lines


def _lines_of_trials(trials: Trials) -> list[str]:
    rows = [trials.columns, *trials.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(trials.columns))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"{trials.folder}: {trials.what}, {trials.state}", *lines, *trials.notes]


def duration(seconds: float) -> str:
    """4000 -> "1 h 7 min"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _plain(facts: Any) -> Any:
    """As JSON takes it: numbers that are none become null."""
    if is_dataclass(facts):
        facts = asdict(facts)
    if isinstance(facts, dict):
        return {str(name): _plain(value) for name, value in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [_plain(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def _value(facts: dict[str, Any], key: str) -> str:
    """One fact by its dotted name. Raises BadInput, naming the nearest known one."""
    value: Any = facts
    for word in key.split("."):
        known = value if isinstance(value, dict) else {}
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
            raise BadInput(f"{key}: there is no {word!r}; " + (f"did you mean {near[0]}? Known are {', '.join(known)}" if near else
                           "what is before it has no parts"))
        value = known[word]
    return printable(value) if isinstance(value, str) else json.dumps(value)
