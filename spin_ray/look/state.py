"""What a run is doing, or how it ended, and all that `spin-ray show` tells of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spin_ray.errors import BadInput
from spin_ray.lock import BEAT_S, Owner, seen_at_work
from spin_ray.look.printable import one_line, printable
from spin_ray.look.progress import Progress, progress_of, steps_of
from spin_ray.look.stored import Stored

RUNNING, FINISHED, STOPPED, DIVERGED, INTERRUPTED, NEVER = (
    "running", "finished", "stopped early", "diverged", "interrupted", "never started"
)
LAST_LINES = 5
_BEFORE_A_RUN = {"logs", "lock"}
"""What a folder may hold in which a run has only tried to begin."""
_VERSION = re.compile(r"iter_(\d+)/(?:model|adapter)/?$")


@dataclass(frozen=True)
class Facts:
    """Of one run, ready to be shown or to become JSON."""

    run: str
    state: str
    why: str
    """What ended it, or who is at work."""
    method: str
    progress: Progress
    versions: dict[int, dict[str, float]]
    """Version -> held-out metrics, and those of the iteration that made it."""
    training: dict[str, float]
    """The last optimizer step's."""
    newest: str
    """Where the last version lies."""
    best: str | None
    """What the file `best` names; None where nothing was evaluated."""
    warnings: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """The last lines that the run said."""


def facts_of(stored: Stored, *, patience_s: float = 2 * BEAT_S) -> Facts:
    """Raises BadInput for a folder that is no run's. `patience_s`: so long a process on another machine may be silent."""
    _refuse_other_folders(stored)
    owner, at_work = seen_at_work(stored.run.storage, stored.run.path / "lock", patience_s=patience_s)
    stored = Stored(stored.run)  # read after the lock: a run that ends meanwhile has said so
    config = stored.config
    state, why = _state(stored, owner if at_work else None)
    progress = progress_of(stored, since=owner.since, now=owner.seen) if owner and at_work else progress_of(stored, since=None, now=0.0)
    return Facts(
        run=str(stored), state=state, why=one_line(why), method=config.method, progress=progress, versions=versions_of(stored),
        training=_training(stored), newest=_newest(stored), best=best_of(stored), warnings=_warnings(stored),
        said=[printable(line) for line in stored.lines(stored.run.said)[-LAST_LINES:]],
    )


def _refuse_other_folders(stored: Stored) -> None:
    saved = stored.saved_config
    if saved is None and not (stored.on_disk and {path.name for path in stored.run.path.iterdir()} <= _BEFORE_A_RUN):
        raise BadInput(f"{stored}: no run's folder: there is no config.json in it; give one such as runs/demo")
    if saved is not None and not {"run", "spin"} <= saved.keys():
        hint = f"; it is a model's: spin-ray chat {stored} talks to it" if "architectures" in saved else ""
        raise BadInput(f"{stored}: no run's folder: its config.json is not a run's{hint}")


def _state(stored: Stored, owner: Owner | None) -> tuple[str, str]:
    """What is going on, and a word about it."""
    ends = [entry for entry in stored.entries if entry.get("stage") in ("finished", "extended", "stopped")]
    if ends and ends[-1]["stage"] == "finished":  # since it was finished, no more was asked for
        stopped = len(ends) > 1 and ends[-2]["stage"] == "stopped"
        return (STOPPED, ends[-2]["reason"]) if stopped else (FINISHED, "")
    if owner:
        return RUNNING, str(owner)
    diverged, last = stored.marks("diverged"), stored.entries[-1:]
    if diverged and last and last[0] is diverged[-1]:
        return DIVERGED, diverged[-1]["reason"]
    if not stored.marks("prepared"):
        return NEVER, _last_words(stored)
    return INTERRUPTED, _last_words(stored) or "the same command goes on"


def _last_words(stored: Stored) -> str:
    """Why the last session ended, if it could still say so."""
    last = (stored.lines(stored.run.said) or [""])[-1][21:]
    return last.removeprefix("spin-ray: ") if last.startswith("spin-ray: ") else ""


def versions_of(stored: Stored) -> dict[int, dict[str, float]]:
    """Every version that is finished or evaluated: its held-out metrics, and the last step and the seconds of its training."""
    last_steps = {line.get("iteration"): line for line in steps_of(stored)}
    evaluations = {mark["version"]: mark["metrics"] for mark in stored.marks("evaluation")}
    made = {mark["iteration"] + 1: mark for mark in stored.marks("iteration")}
    table = {}
    for version in sorted({0, *evaluations, *made} if stored.entries else ()):
        report = made[version]["report"] if version in made else {}
        trained = {"train_s": report.get("wall_s"), "waited_s": report.get("waited_s"), **_learnt(last_steps.get(version - 1, {}))}
        known = {name: value for name, value in trained.items() if value is not None} if version in made else {}
        table[version] = {**evaluations.get(version, {}), **known}
    return table


def _learnt(step: dict[str, Any]) -> dict[str, float]:
    """The columns of the run's own table."""
    if "train/pair_loss" not in step:
        return {"NLL": step["train/real_nll_nats_per_token"]} if "train/real_nll_nats_per_token" in step else {}
    term = step["train/loss"] - step["train/pair_loss"]
    return {"loss": step["train/pair_loss"], **({"NLL term": term} if term else {}), "margin": step["train/margin"]}


def _training(stored: Stored) -> dict[str, float]:
    step = next(reversed(steps_of(stored)), {})
    return {name.removeprefix("train/"): value for name, value in step.items() if name.startswith("train/")}


def best_of(stored: Stored) -> str | None:
    return stored.read("best").decode(errors="backslashreplace").strip() or None


def version_named(name: str) -> int:
    """Which version a file such as `best` names; where the run's folder lay then does not matter."""
    found = _VERSION.search(name)
    return int(found[1]) + 1 if found else 0


def _newest(stored: Stored) -> str:
    made = stored.marks("iteration")
    if made:
        return made[-1].get("model") or stored.named(f"iter_{made[-1]['iteration']:03d}/model")
    model = stored.config.model
    return str(model.adapter or model.path) if stored.saved_config else ""


def _warnings(stored: Stored) -> list[str]:
    """What a reader should know though the run went on."""
    found = [
        f"rolled back at iteration {mark['iteration']}, step {mark['step']}: {one_line(mark['error'])}; {mark['lr_scale']:g} times the "
        "learning rate since" for mark in stored.marks("rollback")
    ]
    if (sessions := len(stored.marks("session"))) > 1:
        found.append(f"it went on {sessions - 1} times after an end")
    restarts = [line["sampler/num_restarts"] for line in stored.metrics if "sampler/num_restarts" in line]
    if any(restarts):
        found.append(f"samplers were started anew {_most_per_session(restarts)} times")
    again = _steps_again(steps_of(stored))
    if again:
        found.append(f"steps of the main player were taken again {again} times: its workers were started anew, or the run went on")
    return found


def _most_per_session(counts: Sequence[int]) -> int:
    """Of counts that begin at 0 with each session, all together."""
    return sum(count for count, after in zip(counts, [*counts[1:], 0], strict=True) if after < count)


def _steps_again(steps: Sequence[dict[str, Any]]) -> int:
    numbers = [step["train/global_step"] for step in steps]
    return sum(later <= earlier for earlier, later in itertools.pairwise(numbers))
