"""Both players of a run as they start: where an earlier session stopped, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spin_ray.config import Config
from spin_ray.errors import BadInput
from spin_ray.learner.group import Learner
from spin_ray.manifest import RunDir
from spin_ray.methods import method_of
from spin_ray.model import ModelFacts
from spin_ray.placement import Hardware
from spin_ray.records import Pair
from spin_ray.sampler.pool import start_opponent


@dataclass(frozen=True)
class Players:
    pool: Any
    """Actor handle of the SamplerPool; None where nothing is played or evaluated."""
    learner: Learner


@contextmanager
def start_players(
    config: Config, run: RunDir, facts: ModelFacts, hardware: Hardware, max_model_len: int, proof: tuple[Pair, ...], *,
    samplers: bool = True,
) -> Iterator[Players]:
    """Start opponent, if there are to be samplers, and main player side by side from the newest finished version. `proof`: pairs of
    preflight.py.
    """
    version = len(run.marks("iteration"))
    if version:
        run.check_model(version - 1)
    run.drop_outdated(config.run, method_of(config).needed(version))
    model_path = str(run.model(version - 1)) if version else facts.path
    # In float32 the exported model is exact; a bfloat16 one lacks its float32 masters.
    checkpoint = run.checkpoint(version - 1) if version and hardware.dtype == "bfloat16" else None
    if checkpoint and not run.storage.exists(checkpoint):
        where = run.storage.name(checkpoint)
        raise BadInput(f"{where}: the checkpoint of the last finished iteration is gone; put it back, or start a new run")
    pool = None
    if samplers:
        pool = start_opponent(config, model_path, version, hardware, max_model_len=max_model_len, logs=run.logs, storage=run.storage)
    learner = Learner(
        config, hardware, model_path=model_path, logs=run.logs, checkpoint=checkpoint, rollbacks=len(run.marks("rollback")),
        storage=run.storage, proof_pairs=proof,
    )
    yield Players(pool, learner)
    learner.stop()
