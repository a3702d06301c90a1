"""Where each version of a run lies: theta_0, and what every iteration made of it. With an adapter theta is a base, always the same, and it.

| | theta_0 | theta_{t+1} |
|---|---|---|
| all weights trained | `model.path` | iter_t/model |
| an adapter | the base and `model.adapter`, or start/adapter, which changes nothing yet | `model.path` and iter_t/adapter |

The base is `model.path`, or with `model.quantization` start/base, which is written when the run begins (learner/base.py).

An adapter's iteration leaves iter_t/model too, merged, unless `lora.export_merged=false`.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_ray.config import Config, LoraConfig
from spin_ray.errors import BadInput
from spin_ray.learner.messages import Save
from spin_ray.manifest import RunDir
from spin_ray.model import ModelFacts
from spin_ray.records import Saved

if TYPE_CHECKING:
    from spin_ray.exchange.adapters import AdapterFiles


@dataclass(frozen=True)
class Thetas:
    """The versions of one run."""

    run: RunDir
    lora: LoraConfig
    first: Saved
    """theta_0."""

    def saved(self, version: int) -> Saved:
        """Where theta_version lies, for the main player."""
        if not version:
            return self.first
        if self.first.adapter:
            return Saved(self.first.model, str(self.run.adapter(version - 1)))
        return Saved(str(self.run.model(version - 1)))

    def played(self, version: int) -> Saved:
        """The same for the samplers: merged, if they are to have it so."""
        if self.first.adapter and self.lora.sync == "merged":
            return Saved(str(self.run.model(version - 1)) if version else self.first.model)
        return self.saved(version)

    def folders(self, iteration: int) -> list[Path]:
        """What an iteration writes that holds its weights; the first is what the user is told of."""
        if not self.first.adapter:
            return [self.run.model(iteration)]
        return [*([self.run.model(iteration)] if self.lora.export_merged else []), self.run.adapter(iteration)]

    def save(self, iteration: int) -> Save:
        """The main player's command to write them."""
        model, adapter = self.run.model(iteration), self.run.adapter(iteration)
        written = self.folders(iteration)
        return Save(
            str(model) if model in written else None, str(self.run.checkpoint(iteration)), str(adapter) if adapter in written else None
        )

    def name(self, version: int) -> str:
        """For the user."""
        return self.run.storage.name(self.folders(version - 1)[0]) if version else self.first.adapter or self.first.model


def thetas_of(config: Config, run: RunDir, facts: ModelFacts) -> Thetas:
    """Make theta_0's adapter, if there is to be one and none is given. Raises BadInput for one that the config does not fit."""
    lora, given = config.lora, facts.adapter
    base = str(run.quantized_base()) if config.model.quantization else facts.path
    if given:
        _check_given(config, facts.path, given)
    elif lora.rank:
        given = str(_first_adapter(config, run, facts))
    return Thetas(run, lora, Saved(base, given or None))


def _check_given(config: Config, base: str, folder: str) -> None:
    """Raise BadInput, before anything starts, for an adapter that is not one of the base, or not the one that the config speaks of."""
    from spin_ray.exchange.adapters import read_adapter
    from spin_ray.learner.adapter import check_of_model

    files, lora = read_adapter(Path(folder)), config.lora
    rank, alpha, target = (files.config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if lora.rank != rank:
        raise BadInput(
            f"model.adapter={folder} has rank {rank}, and lora.rank={lora.rank}: set lora.rank={rank} to train it on, or merge it "
            "into its base and train all weights"
        )
    if lora.alpha and lora.alpha != alpha:
        raise BadInput(f"model.adapter={folder} has alpha {alpha}, and lora.alpha={lora.alpha:g}: leave it out, the adapter's own is used")
    if lora.target and (isinstance(target, str) or sorted(lora.target) != sorted(target or ())):
        raise BadInput(f"model.adapter={folder} has target_modules {target}, and lora.target={lora.target}: leave it out, its own are used")
    if lora.sync == "merged":
        raise BadInput(f"model.adapter={folder} does not go with lora.sync=merged: samplers begin with theta_0, which is merged nowhere")
    check_of_model(_blank(base), files, folder)


def make_base(config: Config, run: RunDir, facts: ModelFacts, dtype: str) -> None:
    """Before the players of a run with `model.quantization` start: write their base, in the dtype that they compute in."""
    folder = run.quantized_base()
    if config.model.quantization and not run.marks("quantized_base"):
        run.storage.prepare(folder)
        write_quantized_base(config, facts, run.storage.draft(folder), dtype)
        run.storage.upload(folder)
        run.storage.commit(folder)
        run.mark("quantized_base")


def write_quantized_base(config: Config, facts: ModelFacts, folder: Path, dtype: str) -> None:
    """What samplers play with, and the learner quantises, in place of `model.path`. Raises BadInput."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # which gives the memory back
        process.submit(_write_base, facts.path, folder, dtype, config.model.trust_remote_code).result()


def _write_base(source: str, folder: Path, dtype: str, trust_remote_code: bool) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from spin_ray.learner.base import write_base

    write_base(source, folder, dtype=dtype, trust_remote_code=trust_remote_code)


def _first_adapter(config: Config, run: RunDir, facts: ModelFacts) -> Path:
    """theta_0's, drawn with the run's seed."""
    folder = run.first_adapter()
    if not run.marks("first_adapter"):
        run.storage.prepare(folder)
        new_adapter_of(facts.path, config.lora, seed=config.run.seed).write(run.storage.draft(folder))
        run.storage.upload(folder)
        run.storage.commit(folder)
        run.mark("first_adapter")
    return folder


def new_adapter_of(base: str, lora: LoraConfig, *, seed: int) -> AdapterFiles:
    """One that changes nothing yet of the model in the folder `base`, whose weights nobody reads for it. Raises BadInput."""
    from spin_ray.learner.adapter import first_adapter

    return first_adapter(_blank(base), lora, base=base, seed=seed)


def _blank(base: str) -> Any:
    """The model of a folder without its weights."""
    import torch
    from transformers import AutoConfig

    from spin_ray.families import auto_class

    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        return auto_class(config).from_config(config)
