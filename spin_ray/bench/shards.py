"""`bench shards`: the memory of a learner's rank under ZeRO-3 while it loads, exports and checkpoints, alone and as one of several.

Every rank is a process of its own on the CPU, in float32. Before each part malloc gives back what is free, and the kernel forgets the
process's peak. What is told is the peak of the part, less what the process held before it knew the model: Python and the libraries.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from spin_ray.bench.common import print_result
from spin_ray.errors import RunStopped

PARTS = ("load", "step", "publish", "export", "save", "resume")


def main(argv: Sequence[str]) -> int:
    """Prints a Markdown table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(prog="spin-ray bench shards", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="0.3b", help="shape of the model")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--bucket-mib", type=int, default=64, help="tensors that are gathered at once when weights leave the learner")
    parser.add_argument("--rank", nargs=2, metavar=("FOLDER", "WORLD_SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rank:
        return _rank(Path(options.rank[0]), int(options.rank[1]), options.bucket_mib * 2**20)
    from spin_ray.bench.workload import save_model

    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as name:
        save_model(Path(name, "model"), options.model)
        alone, several = (_peaks(Path(name), number, argv) for number in (1, options.ranks))
    print(f"| part | alone, GiB | each of {options.ranks}, GiB | ratio |\n|---|---|---|---|")
    for part in PARTS:
        print(f"| {part} | {alone[part]:.2f} | {several[part]:.2f} | {several[part] / alone[part]:.2f} |")
    print_result({"model": options.model, "ranks": options.ranks, "alone_gib": alone, "each_gib": several})
    return 0


def _peaks(folder: Path, world_size: int, argv: Sequence[str]) -> dict[str, float]:
    """Part -> the largest peak of a rank."""
    into = folder / f"world_{world_size}"
    into.mkdir()
    words = [sys.executable, "-m", "spin_ray", "bench", "shards", *argv, "--rank", str(folder), str(world_size)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    logs = [into / f"log_{rank}" for rank in range(world_size)]
    ranks = [
        subprocess.Popen(words, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        for rank, log in zip(ranks, logs, strict=True):
            if rank.wait():
                raise RunStopped(f"a rank failed: {log.read_text()[-2000:]}")
    finally:
        for rank in ranks:
            rank.kill()
    found = [json.loads(path.read_text()) for path in into.glob("peaks_*.json")]
    return {part: max(peaks[part] for peaks in found) for part in PARTS}


def _rank(folder: Path, world_size: int, bucket_bytes: int) -> int:
    import numpy as np
    import torch.distributed as dist

    from spin_ray.bench.workload import SHAPES, random_pairs
    from spin_ray.config import LearnerConfig
    from spin_ray.learner.engine import MainPlayer
    from spin_ray.learner.meters import forget_peak, peak_resident_gib
    from spin_ray.losses import PairObjective
    from spin_ray.placement import Hardware
    from spin_ray.records import Saved

    rank, into = int(os.environ["RANK"]), folder / f"world_{world_size}"
    dist.init_process_group("gloo", init_method=f"file://{into}/store", rank=rank, world_size=world_size)
    forget_peak()
    before, peaks = peak_resident_gib(), {}

    def measured(part: str, work: Callable[[], object]) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak()
        work()
        peaks[part] = peak_resident_gib() - before

    def load() -> None:
        nonlocal player
        hardware = Hardware("cpu", "float32", 0, 0, 1e-3, True, 1, "gloo")
        config = LearnerConfig(optimizer="adamw", zero_stage=3, batch_pairs=4, pack_tokens=256)
        player = MainPlayer(Saved(str(folder / "model")), config, hardware)

    player: MainPlayer
    pairs = random_pairs(4, vocab_size=min(shape["vocab_size"] for shape in SHAPES.values()))
    measured("load", load)
    measured("step", lambda: player.step(pairs, np.zeros((4, 1, 3, 2)), objective=PairObjective(0.1), lr=1e-5))
    measured("publish", lambda: [None for _ in player.weights(bucket_bytes)])
    measured("export", lambda: player.export(into / "model", bucket_bytes))
    measured("save", lambda: player.save_checkpoint(into / "state"))
    measured("resume", lambda: player.load_checkpoint(into / "state"))
    (into / f"peaks_{rank}.json").write_text(json.dumps(peaks))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the libraries' threads may abort an interpreter that ends
