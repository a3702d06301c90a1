"""A learner's rank for test_learner.py: `python ranks.py MODEL OUT OPTIMIZER SETUP...` with RANK and WORLD_SIZE set.

Takes three optimizer steps under every setup (a ZeRO stage, or a name of SETUPS), on batches whose packing is uneven, and writes rank 0's losses,
gradient norms and weights to OUT/stage_SETUP.pt. Several models, with os.pathsep between, have a folder each: OUT/NAME. MODEL@ADAPTER is a
base with an adapter.
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from spin_ray.config import LearnerConfig
from spin_ray.errors import BadInput
from spin_ray.learner.engine import MainPlayer
from spin_ray.losses import PairObjective
from spin_ray.placement import Hardware
from spin_ray.records import Pair, Saved, opponent_reference

HARDWARE = Hardware("cpu", "float32", 0, 0, 1e-3, True, 1, "gloo")
SETUPS = {
    "offload_2": {"zero_stage": 2, "offload_optimizer": True},
    "offload_3": {"zero_stage": 3, "offload_optimizer": True},
    "checkpointed": {"zero_stage": 0, "activation_checkpointing": True},
    "bfloat16": {"zero_stage": 2},
}


def batch(seed: int, count: int) -> list[Pair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for k in range(count):
        lengths = rng.integers(2, [20, 30, 30])
        ids = [rng.integers(5, 500, length).astype(np.int32) for length in lengths]
        pairs.append(Pair(k, 0, 0, 0, *ids, *[-rng.random(n).astype(np.float32) for n in lengths[1:]], "stop"))
    return pairs


def references(pairs: list[Pair]) -> np.ndarray:
    return np.array([[opponent_reference(pair)] for pair in pairs])


def damage(player: MainPlayer, checkpoint: Path) -> list[str]:
    """What the player says to each of the checkpoint's files when it is cut short, has a broken head, or is not there."""
    complaints = []
    for path in [path for path in checkpoint.rglob("*.pt") if path.is_file()]:
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2], b"\0" * 64 + whole[64:], None):
            path.unlink() if broken is None else path.write_bytes(broken)
            try:
                player.load_checkpoint(checkpoint)
                complaints.append(f"{path} was loaded")
            except BadInput as error:
                complaints.append(str(error))
        path.write_bytes(whole)
    return complaints


class RunsCode:
    """What an attacker would put into a checkpoint: unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self._folder),)


def refuses_code(player: MainPlayer, checkpoint: Path) -> bool:
    for path in checkpoint.glob("state/*.pt"):
        torch.save({**torch.load(path, weights_only=False), "more": RunsCode(checkpoint / "made")}, path)
    try:
        player.load_checkpoint(checkpoint)
    except BadInput as error:
        return "UnpicklingError" in str(error) and not (checkpoint / "made").exists()
    return False


def three_steps(player: MainPlayer) -> list[dict]:
    objective, steps = PairObjective(0.1, nll_weight=0.1), []
    for step, count in enumerate([9, 8, 1]):  # 9 and 1 do not divide by two ranks
        pairs = batch(step, count)
        steps.append(player.step(pairs, references(pairs), objective=objective, lr=1e-3))
    return steps


def main(saved: Saved, out: Path, stage: str, optimizer: str) -> None:
    setup = SETUPS[stage] if stage in SETUPS else {"zero_stage": int(stage)}
    config = LearnerConfig(optimizer=optimizer, pack_tokens=60, grad_clip=0.5, **setup)
    hardware = dataclasses.replace(HARDWARE, dtype="bfloat16" if stage == "bfloat16" else "float32")
    player = MainPlayer(saved, config, hardware, proof_pairs=batch(7, 3))
    player.save_checkpoint(out / f"start_{stage}")
    player.begin_iteration()
    player.keep_copy("opponent")
    before = player.score(batch(9, 5))
    steps = three_steps(player)
    scores = {"before": before, "frozen": player.score(batch(9, 5), copy="opponent"), "after": player.score(batch(9, 5))}
    player.keep_copy("base", saved)  # theta_0, from its folder
    scores["base"] = player.score(batch(9, 5), copy="base")
    logps = player.token_logps(batch(9, 5))
    alone = [answer for pair in batch(9, 5) for answer in player.token_logps([pair])]
    weights = {name: tensor.clone() for bucket in player.weights(bucket_bytes=20_000) for name, tensor in bucket}
    player.save_checkpoint(out / f"checkpoint_{stage}")
    player.load_checkpoint(out / f"checkpoint_{stage}")
    player.export(out / f"model_{stage}", bucket_bytes=20_000)
    player.export_adapter(out / f"adapter_{stage}")
    player.load_checkpoint(out / f"start_{stage}")
    player.begin_iteration()
    again = three_steps(player)
    afresh = {}
    if stage != "bfloat16":  # whose export lacks the float32 masters
        player.export(out / f"end_{stage}", bucket_bytes=20_000)
        player.export_adapter(out / f"end_adapter_{stage}")
        player.begin_iteration()
        afresh["goes on"] = three_steps(player)
        dist.barrier()
        anew = Saved(saved.model, str(out / f"end_adapter_{stage}")) if saved.adapter else Saved(str(out / f"end_{stage}"))
        afresh["anew"] = three_steps(MainPlayer(anew, config, hardware))
    complaints, refused = [], False
    if player.world_size == 1:
        complaints = damage(player, out / f"checkpoint_{stage}")
        refused = refuses_code(player, out / f"checkpoint_{stage}")
    if player.rank == 0:
        torch.save({"steps": steps, "again": again, "weights": weights, "logps": logps, "alone": alone, "scores": scores, "tied": player.tied_names, "proof": player.proof,
                    "complaints": complaints, "afresh": afresh, "refuses_code": refused}, out / f"stage_{stage}.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    models = [Path(model) for model in sys.argv[1].split(os.pathsep)]
    for model in models:
        into = Path(sys.argv[2], model.name) if len(models) > 1 else Path(sys.argv[2])
        into.mkdir(exist_ok=True)
        for stage in sys.argv[4:]:
            main(Saved(*str(model).split("@")), into, stage, sys.argv[3])
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's end, with the libraries' threads still there, once was an abort on a busy machine: that is not tested
