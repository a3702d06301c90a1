"""Run folders as a run would leave them at some moment, made without running anything."""

import dataclasses
import json
from pathlib import Path

from spin_ray.config import Config, DpoConfig, RunConfig, SftConfig, SpinConfig, to_json
from spin_ray.config.learner import LearnerConfig
from spin_ray.methods import method_of
from spin_ray.overlap import Overlap

BEGUN = 1_700_000_000.0
STEP_S = 2.0
TRAIN = {"loss": 0.6, "pair_loss": 0.5, "margin": 0.25, "accuracy": 0.75, "real_nll_nats_per_token": 1.5, "lr": 1e-4, "pairs_per_s": 8.0, "waited_s": 0.1}


def config_of(folder: Path, *, method: str = "spin", iterations: int = 3, replay: int = 1, epochs: int = 1) -> Config:
    config = Config(method=method, run=RunConfig(name=folder.name, dir=str(folder.parent)))
    config = dataclasses.replace(
        config, spin=SpinConfig(num_iterations=iterations, num_epochs=epochs, replay=replay), sft=SftConfig(num_epochs=epochs),
        dpo=DpoConfig(num_epochs=epochs), learner=LearnerConfig(batch_pairs=4),
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path="demo:sft"))


class MadeRun:
    """Writes what a run writes, in its order."""

    def __init__(self, folder: Path, config: Config, sizes=(8, 8, 3)):
        self.folder, self.config, self.sizes = folder, config, list(sizes)
        self.overlap = Overlap(config, method_of(config), self.sizes)
        self.clock = BEGUN
        self.folder.mkdir(parents=True)
        (folder / "logs").mkdir()
        (folder / "config.json").write_text(to_json(config))

    def append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(text)

    def mark(self, stage: str, **facts) -> None:
        self.append("manifest.jsonl", json.dumps({"stage": stage, **facts}) + "\n")

    def log(self, group: str, metrics: dict, **stamp) -> None:
        named = {f"{group}/{name}": value for name, value in metrics.items()}
        self.append("metrics.jsonl", json.dumps({"time": self.clock, **stamp, **named}) + "\n")

    def prepare(self) -> None:
        self.mark("prepared", block_sizes=self.sizes, lengths={})
        self.log("audit", {"mean_nats": 1e-6}, opponent_version=0)

    def evaluate(self, version: int, nll: float = 1.0) -> None:
        self.mark("evaluation", version=version, metrics={"real_nll_nats_per_token": nll, "exact_match_t1_share": 0.5})

    def play(self, t: int, count: int) -> int:
        """The first `count` blocks of iteration t; returns their pairs."""
        folder = self.folder / f"iter_{t:03d}/pairs"
        folder.mkdir(parents=True, exist_ok=True)
        blocks = self.overlap.blocks(t)[:count]
        for block in blocks:
            (folder / f"{block.kind}_{block.index:05d}.parquet").touch()
        return sum(block.size for block in blocks)

    def train(self, t: int, steps: int) -> None:
        for step in range(steps):
            self.clock += STEP_S
            self.log("train", {**TRAIN, "global_step": self.overlap.steps_before(t) + step}, iteration=t, step=step, opponent_version=t)

    def finish_iteration(self, t: int) -> None:
        self.play(t, len(self.overlap.blocks(t)))
        self.train(t, self.overlap.num_steps(t))
        (self.folder / f"iter_{t:03d}/model").mkdir(parents=True, exist_ok=True)
        (self.folder / f"iter_{t:03d}/model/config.json").write_text("{}")
        report = {"num_steps": self.overlap.num_steps(t), "wall_s": 10.0, "waited_s": 1.0}
        self.mark("iteration", iteration=t, model=f"{self.folder}/iter_{t:03d}/model", report=report)

    def say(self, text: str) -> None:
        self.append("logs/said.log", f"2023-11-14 22:13:20  {text}\n")


def half_way(folder: Path, *, finished: int, blocks: int = 0, steps: int = 0, **settings) -> MadeRun:
    """A run in the middle of iteration `finished`."""
    run = MadeRun(folder, config_of(folder, **settings))
    run.prepare()
    for t in range(finished):
        run.evaluate(t)
        run.finish_iteration(t)
    if finished < run.overlap._method.num_iterations:
        run.play(finished, blocks)
        run.train(finished, steps)
    return run
