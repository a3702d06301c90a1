"""`spin-ray tune`: a search over keys of the config, by Optuna. Every trial is a whole run in its own directory.

| what | where |
|---|---|
| trials, as Optuna's journal on disk; the truth, also after a kill | runs/<name>/journal.log |
| a trial's run | runs/<name>/trials/trial_007 |
| the table, the picture, the best config | runs/<name>/table.txt, search.png, best.yaml |

A trial that was cut off goes on where its run stopped. A trial's value is that of its best version; one whose run collapsed (its numbers
went bad, or its last version is far worse than its first) is marked, and counts as pruned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from spin_ray.config import Config, load_config, with_overrides
from spin_ray.errors import BadInput
from spin_ray.lock import held
from spin_ray.manifest import RunDir
from spin_ray.storage import DISK
from spin_ray.study.picture import draw_search
from spin_ray.study.search import LOWER_IS_BETTER, Range, Search, assignment, read_search
from spin_ray.study.trials import Outcome, collapsed, play, refuse_unfinished, side_by_side


@dataclass(frozen=True)
class Result:
    """A trial that has ended, for the table."""

    number: int
    params: dict[str, Any]
    state: str
    """finished, pruned or collapsed."""
    value: float | None
    version: int | None
    """Which version has that value."""
    minutes: float


def tune(config_path: str, search_path: str, overrides: Sequence[str]) -> None:
    """Search until so many trials have ended as the search file wants; the same command goes on."""
    config, _ = load_config(config_path, overrides)
    search = read_search(search_path, config_path, overrides)
    if not config.data.eval:
        raise BadInput("data.eval is not set; tune compares runs on held-out data")
    if config.on_object_store:
        raise BadInput(f"run.dir={config.run.dir}: a search lies on a disk; its trials' runs would be watched there")
    folder = config.run_path
    folder.mkdir(parents=True, exist_ok=True)
    with held(DISK, folder / "lock"):
        _Search(config_path, config, overrides, search, folder).go()


class _Search:
    def __init__(self, config_path: str, config: Config, overrides: Sequence[str], search: Search, folder: Path):
        self._config_path, self._config, self._overrides, self._search, self._folder = config_path, config, overrides, search, folder
        optuna.logging.set_verbosity(logging.ERROR)
        self._check_same_search()
        self._study = optuna.create_study(
            study_name="tune", storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))), load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1) if search.prune else optuna.pruners.NopPruner(),
        )
        self._study.sampler = optuna.samplers.TPESampler(seed=search.seed + len(self._study.trials))  # else it draws the same again
        self._space = {key: _distribution(values) for key, values in search.space.items()}
        for values in search.fixed:
            self._study.enqueue_trial(values, skip_if_exists=True)

    def go(self) -> None:
        running = [Trial(self._study, trial._trial_id) for trial in self._study.get_trials(states=[TrialState.RUNNING])]
        side_by_side(self._trial, [*running, *self._new(len(running))], self._search.concurrent)
        results = self.results()
        table = _table(results, self._metric())
        print(table, end="")
        (self._folder / "table.txt").write_text(table)
        draw_search([asdict(result) for result in results], self._search, self._metric(), self._folder / "search.png")
        if finished := [result for result in results if result.state == "finished"]:
            best = max(finished, key=lambda result: self._better(result.value))
            (self._folder / "best.yaml").write_text(with_overrides(self._config_path, [*self._overrides, *_assignments(best.params)]))
            where = f"trial {best.number}, theta_{best.version}; picture: {self._folder}/search.png"
            print(f"the best config is {self._folder}/best.yaml ({where})")

    def _new(self, num_running: int) -> Any:
        """Trials that are still to be begun, each asked for when its turn comes: by then the ones before have told."""
        done = len(self._study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]))
        for _ in range(max(0, self._search.trials - done - num_running)):
            yield None

    def _trial(self, trial: Trial | None) -> None:
        trial = trial or self._study.ask(self._space)
        name = f"trial_{trial.number:03d}"
        print(f"{name}: {' '.join(_assignments(trial.params))}", flush=True)

        def heard(version: int, metrics: dict[str, float], run: RunDir) -> None:
            trial.report(self._better(metrics[self._metric(metrics)]), version)
            if self._search.prune and trial.should_prune():
                run.stop_file.write_text("below the median of the other trials\n")

        log = self._folder / "logs" / f"{name}.log"
        outcome = play(self._config_path, self._of_trial(name, trial.params), log, heard)
        refuse_unfinished(name, outcome, self._run(trial.number), log)
        self._tell(trial, outcome)

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        run = self._run(trial.number)
        state = "collapsed" if collapsed(run) else "pruned" if run.stop_file.exists() else "finished"
        trial.set_user_attr("state", state)
        trial.set_user_attr("minutes", outcome.seconds / 60)
        scores = {version: self._better(metrics[self._metric(metrics)]) for version, metrics in outcome.evaluations.items()}
        trial.set_user_attr("version", max(scores, key=scores.get, default=None))
        if state == "finished":
            self._study.tell(trial, max(scores.values()))
        else:
            self._study.tell(trial, state=TrialState.PRUNED)
        print(f"trial_{trial.number:03d}: {state}" + (f", {self._shown(max(scores.values()))}" if scores else ""), flush=True)

    def results(self) -> list[Result]:
        """Of all trials that have ended, the best first."""
        found = [self._result(trial) for trial in self._study.trials if trial.state.is_finished()]
        return sorted(found, key=lambda result: (result.state != "finished", -self._better(result.value or 0.0), result.number))

    def _result(self, trial: FrozenTrial) -> Result:
        scores = trial.intermediate_values
        value = max(scores.values()) if scores else None
        attributes = trial.user_attrs
        return Result(
            trial.number, trial.params, attributes.get("state", trial.state.name.lower()), None if value is None else self._better(value),
            attributes.get("version"), attributes.get("minutes", 0.0),
        )

    def _of_trial(self, name: str, params: dict[str, Any]) -> list[str]:
        return [
            *self._overrides, *_assignments(params), f"run.dir={self._folder / 'trials'}", f"run.name={name}",
            f"tracking.wandb.group={self._config.run.name}",
        ]

    def _run(self, number: int) -> RunDir:
        return RunDir(self._folder / "trials" / f"trial_{number:03d}")

    def _metric(self, metrics: dict[str, float] | None = None) -> str:
        """The metric that counts, by its name; auto is decided by the first run's evaluation."""
        if self._search.metric != "auto":
            return self._search.metric
        marks = (mark for trial in self._study.trials for mark in self._run(trial.number).marks("evaluation"))
        known = metrics or next((mark["metrics"] for mark in marks), {})
        return "exact_match_t1_share" if "exact_match_t1_share" in known else "real_nll_nats_per_token"

    def _better(self, value: float) -> float:
        """The value with the sign with which more is better; and back."""
        return -value if self._metric() in LOWER_IS_BETTER else value

    def _shown(self, score: float) -> str:
        return f"{self._metric()} {self._better(score):.4f}"

    def _check_same_search(self) -> None:
        """A search goes on only as it was begun, but for the number of trials and how many run at a time."""
        path, own = self._folder / "search.json", asdict(self._search)
        saved = {"overrides": list(self._overrides), **{key: own[key] for key in ("space", "metric", "seed", "prune", "fixed")}}
        text = json.dumps(saved, indent=2) + "\n"
        if path.exists() and path.read_text() != text:
            raise BadInput(f"{self._folder}: a search that was begun otherwise (search.json); choose another run.name, or delete it")
        path.write_text(text)


def _distribution(values: Range | list[Any]) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(values)
    kind = IntDistribution if isinstance(values.low, int) and isinstance(values.high, int) else FloatDistribution
    return kind(values.low, values.high, log=values.log)


def _assignments(params: dict[str, Any]) -> list[str]:
    return [assignment(key, value) for key, value in params.items()]


def _table(results: Sequence[Result], metric: str) -> str:
    keys = list(results[0].params) if results else []
    rows = [["trial", *keys, metric, "version", "state", "minutes"]]
    for result in results:
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in result.params.values()]
        number = "–" if result.value is None else f"{result.value:.4f}"
        version = "–" if result.version is None else f"theta_{result.version}"
        rows.append([str(result.number), *values, number, version, result.state, f"{result.minutes:.1f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + "\n" for row in rows)
