"""A rank for test_sharded.py: `python sharded_ranks.py FOLDER` with RANK and WORLD_SIZE set; FOLDER has a model in each folder.

Reads each model in shards and whole, and writes rank 0's findings: {model: what differs}.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers.utils import logging

from spin_ray.learner.engine import load_model
from spin_ray.learner.sharded import read_in_shards


def differences(folder: Path, rank: int, dtype: torch.dtype) -> list[str]:
    """Of parameters, buffers and ties, between a model in shards and the same whole; and parameters that this rank still holds whole.

    Raises what DeepSpeed says to it: an engine is made of it at the end.
    """
    read = partial(load_model, str(folder), dtype=dtype)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": dtype == torch.bfloat16}}
    shards, whole = read_in_shards(read, config, dtype=dtype, device=torch.device("cpu")), read()
    found = [f"{name} is held" for name, p in shards.named_parameters() if p.numel() or p.ds_tensor.numel() > p.ds_numel // 2 + 1]
    theirs, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
    if [name for name, _ in shards.named_parameters()] != list(theirs) or shards.training != whole.training:
        found.append("other names, ties or modes")
    for name, parameter in shards.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.data, theirs[name].to(dtype)) or parameter.requires_grad != theirs[name].requires_grad:
                found.append(name)
    found += [*(name for name, buffer in shards.named_buffers() if not torch.equal(buffer, buffers.pop(name))), *buffers]
    optimizer = torch.optim.SGD([parameter for parameter in shards.parameters() if parameter.requires_grad], lr=0.0)
    deepspeed.initialize(model=shards, optimizer=optimizer, config={**config, "zero_allow_untested_optimizer": True})
    if folder.name == "llama":  # meta stands for a GPU here
        elsewhere = read_in_shards(read, config, dtype=dtype, device=torch.device("meta"))
        found += [f"{name} stays where it was read" for name, buffer in elsewhere.named_buffers() if not buffer.is_meta]
    return found


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    models = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{models}/store", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    results = {
        f"{folder.name} {name}": differences(folder, rank, dtype)
        for folder in sorted(models.iterdir()) if folder.is_dir() for name, dtype in dtypes.items()
    }
    Path(models, f"found_{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the libraries' threads may abort an interpreter that ends
