"""A search as its journal tells of it, for those who only look: nothing is written."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState


@dataclass(frozen=True)
class Seen:
    """A trial."""

    number: int
    params: dict[str, Any]
    state: str
    """finished, pruned, collapsed or refused; begun or waiting for one that has not ended."""
    minutes: float | None
    """Of its run, once it has ended."""


def trials_in(folder: Path) -> list[Seen]:
    """In the order of their numbers; none where there is no journal yet."""
    journal = folder / "journal.log"
    if not journal.exists():
        return []
    optuna.logging.set_verbosity(logging.ERROR)
    with suppress(KeyError):  # the study's first line is being written
        study = optuna.load_study(study_name="tune", storage=JournalStorage(JournalFileBackend(str(journal))))
        return [_seen(trial) for trial in study.get_trials(deepcopy=False)]
    return []


def _seen(trial: Any) -> Seen:
    waits = trial.state is TrialState.WAITING
    state = trial.user_attrs.get("state", "waiting" if waits else "begun")
    given = trial.params or trial.system_attrs.get("fixed_params", {})
    return Seen(trial.number, {key: _read(value) for key, value in given.items()}, state, trial.user_attrs.get("minutes"))


def _read(value: Any) -> Any:
    """A choice is kept as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
