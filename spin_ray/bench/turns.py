"""`bench turns`: what of an iteration is lost where sampler and learner take turns on one GPU.

Real: the loop, Ray Data, pool, coordinator, Ray Train's worker, blocks, manifest. Simulated: engine and main player, which sleep as long as
they are told, everything `--faster` times as fast. A turn costs what was published for a model of 8B parameters on an A100: vLLM's level-1
sleep 10.6 s, its waking up 2.2 s; the main player moves 16 GB of weights and 32 GB of float32 masters at 20 GB/s, 2.4 s each way (reckoned,
not measured). What the orchestration itself takes is not made faster, so it is measured without such costs too, and taken off.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence

from spin_ray.bench.common import print_result
from spin_ray.bench.scale import TurnCosts, play
from spin_ray.chatter import captured_output
from spin_ray.config import load_config
from spin_ray.manifest import RunDir
from spin_ray.system import ray_cluster
from spin_ray.timeline import iteration_windows, read_spans

SLEEP_S, WAKE_S, REST_S, RETURN_S = 10.6, 2.2, 2.4, 2.4
NUM_ITERATIONS = 3


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench turns", description=__doc__.splitlines()[0])
    parser.add_argument("--play-s", type=float, default=300.0, help="an iteration's play")
    parser.add_argument("--train-s", type=float, default=900.0, help="an iteration's training")
    parser.add_argument("--faster", type=float, default=30.0)
    parser.add_argument("--prompts", type=int, default=512)
    options = parser.parse_args(argv)
    free, costly = (measure(options, costs) for costs in (0.0, 1.0))
    whole = options.play_s + options.train_s
    turn = (costly - free) * options.faster
    print_result({
        "lost_share": round(turn / (whole + turn), 4), "turn_s": round(turn, 2), "costs_s": SLEEP_S + WAKE_S + REST_S + RETURN_S,
        "orchestration_s": round(free - whole / options.faster, 2), "play_s": options.play_s, "train_s": options.train_s,
    })
    return 0


def measure(options: argparse.Namespace, costs: float) -> float:
    """Seconds of an iteration, the first one, which starts the pipeline, left out; with so many times the published costs."""
    play_s, train_s, costs = options.play_s / options.faster, options.train_s / options.faster, costs / options.faster
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        config, _ = load_config("conf/demo.yaml", [
            f"run.dir={folder}", "run.name=turns", "data.eval=''", f"spin.num_iterations={NUM_ITERATIONS}", "spin.replay=0",
            "placement.mode=shared", "sampler.block_prompts=8", "sampler.max_num_seqs=64", "tracking.wandb.mode=disabled",
        ])
        run = RunDir.open(config)
        os.environ["WANDB_MODE"] = "disabled"
        epochs = config.spin.num_epochs
        with captured_output(run.logs / "driver.log"), ray_cluster(config, samplers=False):
            play(
                config, run, options.prompts / play_s, [epochs * options.prompts / train_s] * NUM_ITERATIONS, options.prompts,
                costs=TurnCosts(SLEEP_S * costs, WAKE_S * costs, REST_S * costs, RETURN_S * costs),
            )
        windows = iteration_windows(read_spans(run.path))
    return (windows[NUM_ITERATIONS - 1][1] - windows[0][1]) / (NUM_ITERATIONS - 1)
