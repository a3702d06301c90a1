"""`spin-ray tune`: a search over keys of the config, by Optuna. Every trial is a whole run in its own directory.

| what | where |
|---|---|
| trials, as Optuna's journal on disk; the truth, also after a kill | runs/<name>/journal.log |
| a trial's run | runs/<name>/trials/trial_007 |
| the table, the picture, the best config | runs/<name>/table.txt, search.png, best.yaml |

A trial that was cut off goes on where its run stopped. A trial's value is that of its best version; one whose run collapsed (its numbers
went bad, or its last version is far worse than its first) is marked, and counts as pruned. One whose values do not go together is
refused, and the search goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from spin_ray.config import Config, differences, load_config, with_overrides
from spin_ray.errors import BadInput
from spin_ray.exits import EXIT_BAD_INPUT
from spin_ray.lock import held
from spin_ray.manifest import RunDir
from spin_ray.places import check_run_folder
from spin_ray.storage import DISK
from spin_ray.study.picture import draw_search
from spin_ray.study.search import LOWER_IS_BETTER, METRICS, Range, Search, assignments, read_search
from spin_ray.study.trials import Outcome, collapsed, play, refuse_unfinished, side_by_side


@dataclass(frozen=True)
class Result:
    """A trial that has ended, for the table."""

    number: int
    params: dict[str, Any]
    state: str
    """finished, pruned, collapsed or refused."""
    value: float | None
    version: int | None
    """Which version has that value; theta_0 is everyone's and does not count."""
    minutes: float
    """Of its run, since it was last begun."""


def tune(config_path: str, search_path: str, overrides: Sequence[str]) -> None:
    """Search until so many trials have ended as the search file wants; the same command goes on."""
    config, _ = load_config(config_path, overrides)
    search = read_search(search_path, config_path, overrides)
    if not config.data.eval:
        raise BadInput("data.eval is not set; tune compares runs on held-out data")
    if config.on_object_store:
        raise BadInput(f"run.dir={config.run.dir}: a search lies on a disk; its trials' runs would be watched there")
    check_run_folder(config)
    with held(DISK, config.run_path / "lock"):
        _Search(config_path, config, overrides, search).go()


class _Search:
    def __init__(self, config_path: str, config: Config, overrides: Sequence[str], search: Search):
        self._config_path, self._config, self._overrides, self._search = config_path, config, overrides, search
        self._folder = config.run_path
        optuna.logging.set_verbosity(logging.ERROR)
        self._check_same_search()
        self._study = optuna.create_study(
            study_name="tune", storage=JournalStorage(JournalFileBackend(str(self._folder / "journal.log"))), load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=3) if search.prune else optuna.pruners.NopPruner(),
        )
        self._study.sampler = optuna.samplers.TPESampler(seed=search.seed + len(self._study.trials))  # else it draws the same again
        self._space = {key: _distribution(values) for key, values in search.space.items()}
        for values in search.fixed:
            self._study.enqueue_trial(self._for_optuna(values), skip_if_exists=True)

    def go(self) -> None:
        running = [Trial(self._study, trial._trial_id) for trial in self._study.get_trials(states=[TrialState.RUNNING])]
        for trial in [trial for trial in running if set(trial.params) != set(self._space)]:  # killed before its values were all drawn
            self._study.tell(trial, state=TrialState.FAIL)
            running.remove(trial)
        side_by_side(self._trial, [*running, *self._new(len(running))], self._search.concurrent)
        results = self.results()
        table = _table(results, self._metric())
        print(table, end="")
        (self._folder / "table.txt").write_text(table)
        where = f"picture: {self._folder}/search.png"
        if finished := [result for result in results if result.state == "finished"]:
            best = max(finished, key=lambda result: self._better(result.value))
            (self._folder / "best.yaml").write_text(with_overrides(self._config_path, [*self._overrides, *assignments(best.params)]))
            where = f"the best config is {self._folder}/best.yaml (trial {best.number}, theta_{best.version}); {where}"
        draw_search([asdict(result) for result in results], self._search, self._metric(), self._folder / "search.png")
        print(where)

    def _new(self, num_running: int) -> Iterator[None]:
        """Trials that are still to be begun, each asked for when its turn comes: by then the ones before have told."""
        for _ in range(self._search.trials - len(self._ended()) - num_running):
            yield None

    def _ended(self) -> list[FrozenTrial]:
        return [trial for trial in self._study.trials if "state" in trial.user_attrs and trial.state.is_finished()]

    def _trial(self, trial: Trial | None) -> None:
        trial = trial or self._study.ask(self._space)
        name, params = f"trial_{trial.number:03d}", self._params(trial)
        print(f"{name}: {' '.join(assignments(params))}", flush=True)
        settings = self._of_trial(name, params)
        try:
            load_config(self._config_path, settings)
        except BadInput as error:  # values that do not go together; the next ones may
            return self._refuse(trial, str(error))

        reported = self._study.trials[trial.number].intermediate_values  # before a kill

        def heard(version: int, metrics: dict[str, float], run: RunDir) -> None:
            value = self._value(metrics)
            if version > 0 and version not in reported:
                trial.report(self._better(value), version)
                if self._search.prune and trial.should_prune():
                    run.stop_file.write_text("below the median of the other trials\n")

        log = self._folder / "logs" / f"{name}.log"
        outcome = play(self._config_path, settings, log, heard)
        if outcome.code == EXIT_BAD_INPUT and any(one.user_attrs["state"] != "refused" for one in self._ended()):  # its values are why
            return self._refuse(trial, outcome.line)
        refuse_unfinished(name, outcome, self._run(trial.number), log)
        self._tell(trial, outcome)

    def _refuse(self, trial: Trial, line: str) -> None:
        trial.set_user_attr("state", "refused")
        self._study.tell(trial, state=TrialState.FAIL)
        print(f"trial_{trial.number:03d}: refused: {line}", flush=True)

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        run = self._run(trial.number)
        scores = {version: self._better(self._value(metrics)) for version, metrics in outcome.evaluations.items() if version > 0}
        state = "collapsed" if collapsed(run) else "pruned" if run.stop_file.exists() else "finished"
        if state == "finished" and not scores:
            raise BadInput(f"trial_{trial.number:03d}: no version after theta_0 was evaluated, so it cannot be compared")
        trial.set_user_attr("state", state)
        trial.set_user_attr("minutes", outcome.seconds / 60)
        trial.set_user_attr("version", max(scores, key=scores.get, default=None))
        if state == "finished":
            self._study.tell(trial, max(scores.values()))
        else:
            self._study.tell(trial, state=TrialState.PRUNED)
        shown = f", {self._metric()} {self._better(max(scores.values())):.4f}" if scores else ""
        print(f"trial_{trial.number:03d}: {state}{shown}", flush=True)

    def results(self) -> list[Result]:
        """Of all trials that have ended, the best first."""
        found = [self._result(trial) for trial in self._ended()]
        return sorted(found, key=lambda result: (result.state != "finished", -self._better(result.value or 0.0), result.number))

    def _result(self, trial: FrozenTrial) -> Result:
        scores = trial.intermediate_values.values()
        attributes = trial.user_attrs
        return Result(
            trial.number, self._params(trial), attributes["state"], self._better(max(scores)) if scores else None,
            attributes.get("version"), attributes.get("minutes", 0.0),
        )

    def _for_optuna(self, values: dict[str, Any]) -> dict[str, Any]:
        """A choice may be a list, which Optuna's journal does not take: it goes there as JSON."""
        return {key: json.dumps(value) if isinstance(self._search.space[key], list) else value for key, value in values.items()}

    def _params(self, trial: Trial | FrozenTrial) -> dict[str, Any]:
        """Key of the config -> value, as the search file has it."""
        return {
            key: json.loads(trial.params[key]) if isinstance(values, list) else trial.params[key]
            for key, values in self._search.space.items()
        }

    def _of_trial(self, name: str, params: dict[str, Any]) -> list[str]:
        return [
            *self._overrides, *assignments(params), f"run.dir={self._folder / 'trials'}", f"run.name={name}",
            f"tracking.wandb.group={self._config.run.name}", f"tracking.wandb.tags={[*self._config.tracking.wandb.tags, 'search']}",
        ]

    def _run(self, number: int) -> RunDir:
        return RunDir(self._folder / "trials" / f"trial_{number:03d}")

    def _metric(self, metrics: dict[str, float] | None = None) -> str:
        """The metric that counts, by its name; auto is decided by the first run's evaluation."""
        if self._search.metric != "auto":
            return self._search.metric
        evaluations = (those for trial in self._study.trials for those in self._run(trial.number).evaluations().values())
        known = metrics or next(evaluations, {})
        return "exact_match_t1_share" if "exact_match_t1_share" in known else "real_nll_nats_per_token"

    def _value(self, metrics: dict[str, float]) -> float:
        """Raises BadInput where the metric that counts is not measured."""
        name = self._metric(metrics)
        if name not in metrics:
            raise BadInput(f"metric={name}: not measured on {self._config.data.eval}, where no row says what is right; known are "
                           f"{', '.join(known for known in METRICS if known in metrics)}")
        return metrics[name]

    def _better(self, value: float) -> float:
        """The value with the sign with which more is better; and back."""
        return -value if self._metric() in LOWER_IS_BETTER else value

    def _check_same_search(self) -> None:
        """A search goes on only as it was begun, but for the number of trials, how many run at a time, and what no result depends on."""
        path, own = self._folder / "search.json", asdict(self._search)
        saved = {"search": {key: own[key] for key in ("space", "metric", "seed", "prune", "fixed")}, "config": asdict(self._config)}
        if not path.exists():
            with DISK.written(path) as temporary:
                temporary.write_text(json.dumps(saved, indent=2) + "\n")
        before = json.loads(path.read_text())
        changed = [f"{key}: {before['search'][key]} -> {value}" for key, value in saved["search"].items() if before["search"][key] != value]
        if changed := [*changed, *differences(self._config, before["config"])]:
            raise BadInput(f"{self._folder}: a search begun otherwise ({'; '.join(changed)}); choose another run.name or delete it")


def _distribution(values: Range | list[Any]) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution([json.dumps(value) for value in values])
    return (IntDistribution if values.whole else FloatDistribution)(values.low, values.high, log=values.log)


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
