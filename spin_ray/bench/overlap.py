"""`bench overlap`: the same job in `sequential`, `stream` and `lookahead`: who waits how long, and is the result the same?

Greedy sampling, so that the players' answers can be compared one by one. An iteration lasts from the end of the training
before it to the end of its own, so it holds the sync, the play and the training; iteration 0 begins when play begins.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spin_ray.bench.common import last_evaluation, print_result, run_spin
from spin_ray.records import Span
from spin_ray.timeline import MAIN_PLAYER, idle_share, iteration_windows, merged

MODES = ("sequential", "stream", "lookahead")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="conf/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as folder:
        runs = {mode: Path(folder) / mode for mode in MODES}
        found = {mode: measure(options.config, runs[mode], mode, options.overrides) for mode in MODES}
        same = compare(runs["sequential"], runs["stream"])
    for mode, result in found.items():
        walls = ", ".join(f"{seconds:.1f}" for seconds in result["iteration_s"])
        idle = f"main player idle {result['learner_idle_shares']}, opponent idle {result['opponent_idle_shares']}"
        print(f"{mode:<12} iterations {walls} s; {idle}")
    stream = found["stream"]
    print_result({
        **{f"{mode}_s": round(sum(result["iteration_s"]), 2) for mode, result in found.items()},
        "stream_learner_wait_share": round(stream["later_learner_idle_share"], 4),
        **same, "modes": found,
    })
    return 0


def measure(config: str, run: Path, mode: str, overrides: Sequence[str]) -> dict[str, Any]:
    spans = run_spin(config, run, [*overrides, "sampler.temperature=0", f"overlap.mode={mode}"])
    windows = iteration_windows(spans)
    later = (windows[1][0], windows[max(windows)][1]) if len(windows) > 1 else windows[0]
    opponents = sorted({span.player for span in spans} - {MAIN_PLAYER})
    return {
        "iteration_s": [round(end - begin, 2) for begin, end in windows.values()],
        "learner_waited_s": [round((e - b) * idle_share(spans, MAIN_PLAYER, b, e), 2) for b, e in windows.values()],
        "opponent_waited_s": [round((e - b) * _mean_idle(spans, opponents, b, e), 2) for b, e in windows.values()],
        "learner_idle_shares": [round(idle_share(spans, MAIN_PLAYER, b, e), 3) for b, e in windows.values()],
        "opponent_idle_shares": [round(_mean_idle(spans, opponents, b, e), 3) for b, e in windows.values()],
        "later_learner_idle_share": idle_share(spans, MAIN_PLAYER, *later),
        "play_s": round(sum(s.end - s.begin for s in merged(spans) if s.activity == "play" and s.player == opponents[0]), 2),
        "evaluation": last_evaluation(run),
    }


def _mean_idle(spans: Sequence[Span], players: Sequence[str], begin: float, end: float) -> float:
    return float(np.mean([idle_share(spans, player, begin, end) for player in players]))


def compare(left: Path, right: Path) -> dict[str, Any]:
    """Are the pairs of two runs the same (prompt, iteration, answer, token by token), and how far apart are their references?"""
    pairs = [_pairs(run) for run in (left, right)]
    both = pairs[0].keys() & pairs[1].keys()
    equal = [key for key in both if pairs[0][key][0] == pairs[1][key][0]]
    return {
        "pairs_identical": len(equal) == len(pairs[0]) == len(pairs[1]),
        "num_pairs": len(pairs[0]),
        "num_pairs_identical": len(equal),
        "largest_reference_difference_nats": max(float(np.abs(pairs[0][key][1] - pairs[1][key][1]).max()) for key in equal),
    }


def _pairs(run: Path) -> dict[tuple[int, str, int], tuple[list[int], np.ndarray]]:
    found = {}
    for path in sorted(run.glob("iter_*/pairs/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            key = row["iteration"], path.name.split("_")[0], row["prompt_id"]
            found[key] = row["generated_ids"], np.array(row["opponent_real_logps"] + row["opponent_generated_logps"])
    return found
