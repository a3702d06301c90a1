"""`bench chaos`: a tiny job whose processes are killed at random moments, beside the same job left alone.

Whenever the job ends with another code than 0 the same command is started again, as a user would. Answers are greedy, so at
its end every pair can be compared with that of the undisturbed job: prompt, iteration, versions, tokens. `overhead_share` is the
share of the disturbed jobs' time that undisturbed ones would not have taken.

| what is killed | whose business it is to go on |
|---|---|
| sampler, learner's worker, Ray Train's controller, play process | the run's own |
| one of Ray's helpers, pool, coordinator, raylet, driver, all processes at once (as when a machine dies) | the same command's |
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from spin_ray.bench.common import last_evaluation, print_result
from spin_ray.errors import RunStopped

HEALED = {"sampler": "ray::Sampler", "worker": "ray::RayTrainWorker", "controller": "ray::TrainController", "play": "ray::MapWorker"}
"""What a run puts up with by itself -> the name of its process."""
RESTARTED = {"pool": "ray::SamplerPool", "coordinator": "ray::Coordinator", "raylet": "raylet"}
"""What ends a run; the same command goes on."""
KINDS = (*HEALED, *RESTARTED, "helper", "driver", "machine")
JOB = (
    "spin.num_iterations=3", "data.max_prompts=320", "data.max_eval_prompts=64", "sampler.block_prompts=16", "sampler.temperature=0",
    "learner.batch_pairs=8", "learner.checkpoint_every_steps=5", "sampler.max_restarts=1000", "learner.max_restarts=1000",
)
PATIENCE_S = 300.0
"""Without a new step, block or mark for so long, a job hangs; it starts in 45 s on two idle cores."""
MOST_RESTARTS = 4
"""Of the command after one fault; a job that needs more cannot go on."""
LINGER_S = 30.0
"""A process that is there so long after its job's end is left behind."""
LONGEST_PAUSE_S = 5.0
"""Between a job's sign of life and the next fault."""
BLIND_SHARE = 0.25
"""Of the faults, those that do not wait for a sign of life: they also hit a job that starts, or recovers from the fault before."""
COUNTED = ("missing_pairs", "duplicate_pairs", "wrong_version_pairs", "missing_models")
"""What `compare` finds of which there must be none."""
WEIGHT_TOLERANCE, NLL_TOLERANCE = 1e-5, 1e-4
"""Largest mean |difference| of a tensor's weights (one step moves a weight by up to 5e-4), and of the held-out NLL per token."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    parser.add_argument("--faults", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to kill")
    parser.add_argument("--folder", type=Path, help="keep the jobs there; an undisturbed one that is there is not played again")
    parser.add_argument("--config", default="conf/demo.yaml")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as temporary:
        return _main(options, (options.folder or Path(temporary)).absolute())


def _main(options: argparse.Namespace, folder: Path) -> int:
    alone, alone_s = folder / "undisturbed", folder / "undisturbed_s"
    rng = random.Random(options.seed)
    kinds, jobs, seconds, checks = _kinds(rng, options.kinds), [], 0.0, []
    if not alone_s.exists():
        alone_s.write_text(str(_play(_job(options.config, alone), kinds, 0, rng)))
    while (left := options.faults - sum(len(job.faults) for job in jobs)) > 0 and not any(job.hung for job in jobs):
        run = folder / f"disturbed-{options.seed}-{len(jobs)}"
        jobs.append(_job(options.config, run))
        seconds += _play(jobs[-1], kinds, left, rng)
        checks.append(compare(alone, run))
    faults = [fault for job in jobs for fault in job.faults]
    counted = {key: sum(check[key] for check in checks) for key in COUNTED}
    counted["leftover_processes"] = sum(len(job.leftovers) for job in jobs)
    differences = {key: _largest(check[key] for check in checks) for key in ("different_answers", "weight_difference", "nll_difference")}
    print_result({
        "faults": len(faults), "survived": sum(fault.survived for fault in faults), **counted, **differences,
        "overhead_share": round(1 - len(jobs) * float(alone_s.read_text()) / max(seconds, 1e-9), 3), "disturbed_s": round(seconds, 1),
        "jobs": len(jobs), "kinds": dict(Counter(fault.kind for fault in faults)), "restarts": sum(fault.restarts for fault in faults),
        "not_healed": [fault.kind for fault in faults if fault.restarts and fault.kind in HEALED],
    })
    within = differences["weight_difference"] <= WEIGHT_TOLERANCE and differences["nll_difference"] <= NLL_TOLERANCE
    return int(any(job.hung for job in jobs) or any(counted.values()) or not within)


def _job(config: str, run: Path) -> Job:
    """A job that is at its beginning."""
    shutil.rmtree(run, ignore_errors=True)
    return Job([sys.executable, "-m", "spin_ray", "run", config, f"run.dir={run.parent}", f"run.name={run.name}", *JOB], run)


def _kinds(rng: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Every kind once in random order, then again."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def _play(job: Job, kinds: Iterator[str], num_faults: int, rng: random.Random) -> float:
    """From the command's first start to its good end; returns the seconds."""
    begun = time.monotonic()
    with job:
        torment(job, kinds, num_faults, rng)
        seconds = time.monotonic() - begun
    return seconds


@dataclass
class Fault:
    kind: str
    restarts: int = 0
    """How often the command was started again before the next fault."""
    survived: bool = True


class Hung(RunStopped):
    """A job makes no progress: it waits for ever, or ends with an error whenever it is started."""


@dataclass
class Job:
    """A job as its user sees it: a command that is started again whenever it ends with another code than 0."""

    command: Sequence[str]
    run: Path
    patience_s: float = PATIENCE_S
    faults: list[Fault] = field(default_factory=list)
    leftovers: list[psutil.Process] = field(default_factory=list)
    """Those of its processes that were still there a while after its end."""
    hung: bool = False

    def __enter__(self) -> Job:
        self.run.parent.mkdir(parents=True, exist_ok=True)
        self._family: set[psutil.Process] = set()
        self._progress, self._progress_at, self._restarts = self.progress(), time.monotonic(), 0
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        _, self.leftovers = psutil.wait_procs(self._family, timeout=LINGER_S)
        for process in self.leftovers:
            print(f"{self.run.name}: left behind: {process}", flush=True)
        _kill(self.leftovers)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Until the condition holds; False if the job finished before. Raises Hung."""
        while not condition():
            if self._driver.poll() == 0:
                return False
            self._look_after()
            time.sleep(0.1)
        return True

    def progress(self) -> tuple[int, ...]:
        """Changes with every step, block and mark."""
        files = self.run / "metrics.jsonl", self.run / "manifest.jsonl"
        sizes = [path.stat().st_size if path.exists() else 0 for path in files]
        return *sizes, len(list(self.run.glob("iter_*/pairs/*.parquet")))

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those that a fault of this kind may hit; for "machine" all of them, the driver first."""
        try:
            driver = psutil.Process(self._driver.pid)
            family = [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self._family |= set(family)
        if kind in ("driver", "machine"):
            return family[:1] if kind == "driver" else family
        titles = {process: _title(process) for process in family}
        named = {**HEALED, **RESTARTED}
        if kind == "helper":
            return [process for process, title in titles.items() if title.startswith("ray::") and title not in named.values()]
        return [process for process, title in titles.items() if title == named[kind]]

    def kill(self, kind: str, victims: Sequence[psutil.Process]) -> None:
        print(f"{self.run.name}: killing {kind} {[_title(victim) for victim in victims][:1]} at {self._progress}", flush=True)
        _kill(victims)
        self.faults.append(Fault(kind))
        self._restarts = 0

    def _start(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self.run.with_suffix(".log").open("ab") as log:
            self._driver = subprocess.Popen(self.command, env={**env, "WANDB_MODE": "offline"}, stdout=log, stderr=log)

    def _look_after(self) -> None:
        self.processes("machine")
        progress, now = self.progress(), time.monotonic()
        if progress != self._progress:
            self._progress, self._progress_at = progress, now
        if now > self._progress_at + self.patience_s:
            raise Hung(f"no progress for {self.patience_s:.0f} s")
        if self._driver.poll():
            self._restarts += 1
            if self._restarts > MOST_RESTARTS:
                raise Hung(f"ended {self._restarts} times, the last time with {self._driver.returncode}")
            if self.faults:
                self.faults[-1].restarts += 1
            print(f"{self.run.name}: ended with {self._driver.returncode}, started again", flush=True)
            self._start()


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _title(process: psutil.Process) -> str:
    """"ray::Sampler" of "ray::Sampler.score", "ray::MapWorker" of "ray::MapWorker(MapBatches(PlayBlock)).submit"."""
    try:
        return process.name().split(".")[0].split("(")[0]
    except psutil.NoSuchProcess:
        return ""


def torment(job: Job, kinds: Iterator[str], num_faults: int, rng: random.Random) -> None:
    """Kill something `num_faults` times, if the job lasts so long, then let it finish; a job that hangs is ended."""
    try:
        while len(job.faults) < num_faults:
            kind, before, blind = next(kinds), job.progress(), rng.random() < BLIND_SHARE
            goes_on = job.wait_for(lambda: blind or job.progress() != before)  # noqa: B023 (called before the next turn)
            until = time.monotonic() + rng.uniform(0, LONGEST_PAUSE_S)
            goes_on = goes_on and job.wait_for(lambda: time.monotonic() > until and job.processes(kind))  # noqa: B023
            if not goes_on:
                return
            victims = job.processes(kind)
            chosen = victims if kind == "machine" else rng.sample(victims, min(1, len(victims)))
            job.kill(kind, chosen)
        job.wait_for(lambda: False)
    except Hung as hung:
        print(f"{job.run.name}: {hung}; see {job.run.with_suffix('.log')}", flush=True)
        _kill(job.processes("machine"))
        job.hung = True
        if job.faults:
            job.faults[-1].survived = False


def compare(alone: Path, run: Path) -> dict[str, Any]:
    """What the pairs, the last model and its held-out NLL of a run have that those of the undisturbed one do not."""
    expected, found = _pairs(alone), _pairs(run)
    counts = Counter(key for key, _, _ in found)
    versions, answers = ({key: row[k] for key, *row in expected} for k in (0, 1))
    models = {path: run / path.relative_to(alone) for path in alone.glob("iter_*/model/model.safetensors")}
    differences = [_weight_difference(left, right) for left, right in models.items() if right.exists()]
    return {
        "missing_pairs": len(versions.keys() - counts.keys()),
        "duplicate_pairs": sum(counts.values()) - len(counts),
        "wrong_version_pairs": sum(version != versions.get(key) for key, version, _ in found),
        "different_answers": sum(answer != answers.get(key) for key, _, answer in found),
        "missing_models": len(models) - len(differences),
        "weight_difference": _largest(differences),
        "nll_difference": abs(_nll(alone) - _nll(run)),
    }


def _pairs(run: Path) -> list[tuple[tuple[str, str, int], tuple[int, ...], list[int]]]:
    """((iteration's folder, kind of block, prompt), versions, generated answer) of every row of every block."""
    stamp = "iteration", "opponent_version", "scored_version", "opponent_steps_early", "scored_steps_early"
    return [
        ((path.parts[-3], path.name.split("_")[0], row["prompt_id"]), tuple(row[name] for name in stamp), row["generated_ids"])
        for path in run.glob("iter_*/pairs/*.parquet") for row in pq.read_table(path).to_pylist()
    ]


def _weight_difference(left: Path, right: Path) -> float:
    """Largest mean |difference| of a tensor."""
    ours, theirs = load_file(left), load_file(right)
    return _largest(float(np.abs(weight - theirs[name]).mean()) for name, weight in ours.items())


def _largest(numbers: Iterable[float]) -> float:
    """0 of none; not a number if any is none, which Python's own `max` may hide."""
    return float(np.max([0.0, *numbers]))


def _nll(run: Path) -> float:
    return last_evaluation(run).get("real_nll_nats_per_token", 0.0)
