"""Both players of a run as they start: where an earlier session stopped, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from spin_ray.config import Config
from spin_ray.errors import BadInput
from spin_ray.learner.group import Learner
from spin_ray.learner.messages import Rest
from spin_ray.methods import method_of
from spin_ray.placement import Hardware
from spin_ray.records import Pair
from spin_ray.sampler.pool import Fleet, start_opponent
from spin_ray.theta import Thetas
from spin_ray.turns import MAIN_PLAYER, OPPONENT, Turns, check_shared


@dataclass(frozen=True)
class Players:
    pool: Any
    """Actor handle of the SamplerPool; None where nothing is played or evaluated."""
    learner: Learner
    takes_turns: bool
    fleet: Fleet | None = None
    """Starts more samplers."""

    def turns(self, opponent: Any, result: Callable[[int], Any]) -> Turns | None:
        """Of players that take turns on the same devices; it is the opponent's. `result`: waits for the learner's answer to a command."""
        return Turns({OPPONENT: opponent, MAIN_PLAYER: _MainPlayer(self.learner, opponent, result)}, OPPONENT) if self.takes_turns else None

    def opponent_is_done(self) -> None:
        """Where the players take turns, the devices are the main player's from here on."""
        if self.takes_turns:
            ray.get(self.pool.sleep.remote())
            self.learner.let_in()


@dataclass(frozen=True)
class _MainPlayer:
    """Its part in taking turns."""

    learner: Learner
    opponent: Any
    result: Callable[[int], Any]

    def rest(self) -> None:
        check_shared(self.opponent.devices, self.result(self.learner.post(Rest())))

    def wake(self) -> None:
        self.learner.let_in()


def as_placed(config: Config, hardware: Hardware, say: Callable[[str], None]) -> Config:
    """The config as this hardware lets it be carried out: players that take turns do not overlap."""
    if not hardware.takes_turns or config.overlap.mode == "sequential":
        return config
    say("sampler and learner take turns on the same devices (placement.mode), so overlap.mode is sequential")
    return replace(config, overlap=replace(config.overlap, mode="sequential"))


@contextmanager
def start_players(
    config: Config, thetas: Thetas, hardware: Hardware, max_model_len: int, proof: tuple[Pair, ...], *, samplers: bool = True,
) -> Iterator[Players]:
    """Start opponent, if there are to be samplers, and main player side by side from the newest finished version. `proof`: pairs of
    preflight.py.
    """
    run, version = thetas.run, len(thetas.run.marks("iteration"))
    if version:
        run.check_weights(version - 1, thetas.folders(version - 1))
    run.drop_outdated(config.run, method_of(config).needed(version))
    # In float32 the exported model is exact; a bfloat16 one lacks its float32 masters.
    checkpoint = run.checkpoint(version - 1) if version and hardware.dtype == "bfloat16" else None
    if checkpoint and not run.storage.exists(checkpoint):
        where = run.storage.name(checkpoint)
        raise BadInput(f"{where}: the checkpoint of the last finished iteration is gone; put it back, or start a new run")
    pool = fleet = None
    if samplers:
        pool, fleet = start_opponent(
            config, thetas.played(version), version, hardware, max_model_len=max_model_len, logs=run.logs, storage=run.storage
        )
    learner = Learner(
        config, hardware, saved=thetas.saved(version), logs=run.logs, checkpoint=checkpoint, rollbacks=len(run.marks("rollback")),
        storage=run.storage, proof_pairs=proof,
    )
    yield Players(pool, learner, hardware.takes_turns, fleet)
    learner.stop()
