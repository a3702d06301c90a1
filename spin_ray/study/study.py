"""`spin-ray study`: what the paper and its readers claim, tried. Arms side by side on the embedded model, and on a real one.

| what | where |
|---|---|
| a line for every finished run: the truth | docs/study/runs.jsonl |
| what the config files came to when the first of them was run | docs/study/configs.json |
| a part's table, between its two marks, and picture, drawn from the lines | docs/study.md, docs/study/PART.png |
| runs that are not finished, logs, data | runs/study/ |

An arm's learning rate is searched first, with one seed, on prompts that no table is made of; then it runs with every seed. What has a line
is not run again; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np

from spin_ray.config import Config, changes_result, load_config
from spin_ray.errors import BadInput
from spin_ray.exchange.pairs import read_pairs
from spin_ray.lock import held
from spin_ray.manifest import RunDir
from spin_ray.places import check_run_folder
from spin_ray.records import Pair, from_table
from spin_ray.storage import DISK
from spin_ray.study.arms import ARMS, PARTS, RATES, Arm, Part
from spin_ray.study.lines import FINAL, SEARCH, Line, Lines, Trial, refuse_other_config
from spin_ray.study.made import make_data
from spin_ray.study.report import report
from spin_ray.study.trials import Outcome, collapsed, play, refuse_to_begin, refuse_unfinished, side_by_side


@dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    seeds: int = 3
    concurrent: int = 1
    """Arms at a time."""
    rates: tuple[float, ...] = RATES


def run_study(words: Sequence[str], out: Path, size: Size) -> None:
    """Run parts and tell what they show. `words`: names of parts, none for all, and key=value settings of every run."""
    names = [word for word in words if "=" not in word] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise BadInput(f"{unknown[0]}: no part of the study; its parts are {', '.join(PARTS)}")
    settings = tuple(word for word in words if "=" in word)
    for name, value in (("--seeds", size.seeds), ("--concurrent", size.concurrent)):
        if value < 1:
            raise BadInput(f"{name} {value}: must be at least 1")
    parts, out = [PARTS[name] for name in names], out.resolve()
    config, _ = load_config(ARMS["spin"].config, settings)
    if config.on_object_store:
        raise BadInput(f"run.dir={config.run.dir}: a study lies on a disk; its runs would be watched there")
    check_run_folder(config)
    out.mkdir(parents=True, exist_ok=True)
    arms = [ARMS[name] for part in parts for name in part.arms]
    for file in dict.fromkeys(arm.config for arm in arms):
        refuse_other_config(out / "configs.json", file)
    for arm in arms:
        if arm.judged:
            from spin_ray.study.judge import encoder_beside  # not at the top: it loads transformers

            encoder_beside(load_config(arm.config, settings)[0].data.eval)
    with held(DISK, config.run_path / "lock"):
        study = Study(Lines(out / "runs.jsonl"), config.run_path, settings, size)
        for part in parts:
            study.run(part)
            print(report(part, ARMS, study.lines, out, study.counted), flush=True)


def measure(arm: Arm, run: RunDir, version: int) -> dict[str, float]:
    """What the study adds to a version's own numbers.

    `right_probability`: of the real answer, the only right one, mean over held-out prompts. What exact match at temperature 1 estimates by
    drawing one answer, without the noise of the draw. Where other answers are as good there is a judge instead.
    """
    if arm.judged:
        from spin_ray.study.judge import judged

        return judged(run, version)
    pairs = from_table(read_pairs(run.heldout_answers(version), run.storage), Pair)
    return {"right_probability": float(np.mean([np.exp(pair.opponent_real_logps.sum(dtype=np.float64)) for pair in pairs]))}


@dataclass
class Study:
    lines: Lines
    folder: Path
    """Of its runs."""
    settings: tuple[str, ...]
    """Of the command line, for every run: key=value."""
    size: Size
    arms: dict[str, Arm] = field(default_factory=lambda: ARMS)
    play: Callable[..., Outcome] = play
    """Carries out a run."""
    measure: Callable[[Arm, RunDir, int], dict[str, float]] = measure
    _searches: dict[str, Lock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._files = make_data(self.folder / "data")
        self._searches = {name: Lock() for name in self.arms}

    @property
    def counted(self) -> tuple[str, ...]:
        """The settings that change results; the others may change from one session to the next."""
        return tuple(setting for setting in self.settings if changes_result(setting.partition("=")[0]))

    def run(self, part: Part) -> None:
        """All runs of the part's arms that have no line yet."""
        side_by_side(self._arm, [self.arms[name] for name in part.arms], self.size.concurrent)

    def _arm(self, arm: Arm) -> None:
        if arm.forecasts:
            return self._probe(arm)
        rate = self._rate(arm)
        for point in arm.points:
            for seed in range(self.size.seeds):
                self._trial(arm, FINAL, (*arm.settings, *self.counted, *point, *rate), seed)

    def _rate(self, arm: Arm) -> tuple[str, ...]:
        """The setting that the search found; none for an arm whose rates are given."""
        if not arm.rate:
            return ()
        searcher = self.arms[arm.rate_of or arm.name]
        with self._searches[searcher.name]:  # who comes second finds its lines
            best = self._search(searcher)
        return (f"{arm.rate}={best:g}",)

    def _search(self, arm: Arm) -> float:
        """The rate whose last version is the best; a search does not end at an end of what it has tried, but at one of `rates`."""
        rates = self.size.rates
        middle = len(rates) // 2
        low, high = max(0, middle - 1), min(len(rates) - 1, middle + 1)
        scores: dict[int, float] = {}
        while True:
            for place in range(low, high + 1):
                if place not in scores:
                    settings = (*arm.settings, *arm.searched_with, *self.counted, f"{arm.rate}={rates[place]:g}")
                    line = self._trial(arm, SEARCH, settings, seed=0)
                    value = float("nan") if line.state == "collapsed" else line.score(line.last)
                    scores[place] = value if np.isfinite(value) else float("-inf")
            best = max(scores, key=lambda place: (scores[place], -place))
            if best == low > 0:
                low -= 1
            elif best == high < len(rates) - 1:
                high += 1
            else:
                return rates[best]

    def _trial(self, arm: Arm, stage: str, settings: tuple[str, ...], seed: int) -> Line:
        trial = Trial(arm.name, stage, settings, seed)
        if line := self.lines.of(trial):
            return line
        refuse_to_begin()
        name = _folder_name(trial, settings[len(arm.settings) :])
        tracked = ("tracking.wandb.group=study", "tracking.wandb.tags=[study]")
        more = [f"run.dir={self.folder / 'runs'}", f"run.name={name}", f"run.seed={seed}", *tracked]
        if stage == SEARCH:
            more.append(f"data.eval={self._files['search']}")
        if arm.data:
            more.append(f"data.train={self._files[arm.data]}")
        overrides = [*settings, *self.settings, *more]
        print(f"{arm.name} ({stage}): {' '.join(settings)} seed {seed}", flush=True)
        log = self.folder / "logs" / f"{name}.log"
        outcome = self.play(arm.config, overrides, log)
        config, _ = load_config(arm.config, overrides)
        line = self._line(arm, trial, outcome, config, log)
        self.lines.add(line)
        shutil.rmtree(config.run_path, ignore_errors=True)
        return line

    def _probe(self, arm: Arm) -> None:
        trial = Trial(arm.name, FINAL, (*arm.settings, *self.counted), seed=0)
        if self.lines.of(trial):
            return
        overrides = [*trial.settings, *self.settings, f"run.dir={self.folder / 'runs'}", f"run.name={arm.name}"]
        log = self.folder / "logs" / f"{arm.name}.log"
        outcome = self.play(arm.config, overrides, log, command="probe")
        run = RunDir(self.folder / "runs" / f"{arm.name}-probe")
        refuse_unfinished(trial.arm, outcome, run, log)
        tries = tuple(json.loads((run.path / "probe.json").read_text())["tries"])
        self.lines.add(Line(arm.name, FINAL, trial.settings, 0, "finished", outcome.seconds / 60, tries=tries))
        shutil.rmtree(run.path, ignore_errors=True)

    def _line(self, arm: Arm, trial: Trial, outcome: Outcome, config: Config, log: Path) -> Line:
        run = RunDir(config.run_path)
        refuse_unfinished(trial.arm, outcome, run, log)
        versions = {version: {**metrics, **self.measure(arm, run, version)} for version, metrics in outcome.evaluations.items()}
        took = ("num_steps", "num_pairs", "num_tokens", "wall_s")
        trainings = tuple({key: mark["report"][key] for key in took} for mark in run.marks("iteration"))
        state = "collapsed" if collapsed(run) else "finished"
        return Line(trial.arm, trial.stage, trial.settings, trial.seed, state, outcome.seconds / 60, versions, trainings)


def _folder_name(trial: Trial, own: Sequence[str]) -> str:
    """Of a run; `own`: what it has beside its arm's settings."""
    pairs = (setting.split("=", 1) for setting in own)
    words = [trial.arm, trial.stage, *(f"{key.split('.')[-1]}_{value}" for key, value in pairs), f"seed_{trial.seed}"]
    return re.sub(r"[^\w.-]+", "_", "-".join(words))
