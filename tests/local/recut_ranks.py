"""A rank for test_recut.py: `python recut_ranks.py write|take FOLDER MODEL ADAPTER SETUP...` with RANK and WORLD_SIZE set.

`write` takes two steps under each setup, saves FOLDER/SETUP, and takes two more. `take` takes that up, saves what it holds as
FOLDER/SETUP_again, and takes the same two. Rank 0 writes the losses to FOLDER/SETUP_losses_N.json, N ranks.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from ranks import HARDWARE, batch, references

from spin_ray.config import LearnerConfig
from spin_ray.learner.engine import MainPlayer
from spin_ray.losses import PairObjective
from spin_ray.records import Saved

SETUPS = {
    "zero_0": {"zero_stage": 0}, "zero_1_bf16": {"zero_stage": 1}, "zero_2": {"zero_stage": 2, "optimizer": "rmsprop"}, "zero_2_lora": {"zero_stage": 2},
    "zero_2_offload": {"zero_stage": 2, "offload_optimizer": True}, "zero_3": {"zero_stage": 3}, "zero_3_bf16": {"zero_stage": 3, "optimizer": "rmsprop"},
    "zero_3_lora": {"zero_stage": 3},
}


def main(mode: str, folder: Path, saved: Saved, name: str) -> None:
    config = LearnerConfig(**{"optimizer": "adamw", "pack_tokens": 60, "grad_clip": 0.5, **SETUPS[name]})
    player = MainPlayer(saved, config, dataclasses.replace(HARDWARE, dtype="bfloat16" if "bf16" in name else "float32"))
    player.begin_iteration()

    def losses(*seeds: int) -> list[float]:
        return [player.step(batch(s, 9), references(batch(s, 9)), objective=PairObjective(0.1), lr=1e-3)["loss"] for s in seeds]

    if mode == "write":
        losses(0, 1)
        player.save_checkpoint(folder / name)
    else:
        player.load_checkpoint(folder / name)
        player.save_checkpoint(folder / f"{name}_again")
    after = losses(2, 3)
    if player.rank == 0:
        (folder / f"{name}_losses_{player.world_size}.json").write_text(json.dumps(after))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mode, folder, model, adapter, *names = sys.argv[1:]
    for name in names:
        main(mode, Path(folder), Saved(model, adapter if "lora" in name else None), name)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the libraries' threads may abort an interpreter that ends
