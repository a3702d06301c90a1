"""`bench memory`: how the step's peak memory grows with the vocabulary, the answers' length and the number of pairs.

Every point is one optimizer step of ours in a process of its own, as in `bench learner`, with the small model and pairs
of equal lengths. Beside it stands what the logits of all answer tokens in float32 would take.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARIES, ANSWERS, PAIRS = (8_000, 32_000, 64_000, 100_000, 150_000), (64, 128, 256, 512), (4, 16, 64)


@dataclass(frozen=True)
class Point:
    """One measurement: pairs with prompts of 64 tokens and two answers of `answer_tokens` each."""

    vocabulary: int = 32_000
    answer_tokens: int = 128
    pairs: int = 16

    @property
    def logits_gib(self) -> float:
        """[tokens, vocabulary] of the whole batch in float32."""
        return 2 * self.pairs * self.answer_tokens * self.vocabulary * 4 / 2**30


SWEEPS = {
    "vocabulary": [Point(vocabulary=v) for v in VOCABULARIES],
    "answer tokens": [Point(answer_tokens=a) for a in ANSWERS],
    "pairs": [Point(pairs=p) for p in PAIRS],
}


def main(argv: Sequence[str]) -> int:
    """Measure all sweeps; prints a Markdown table, draws `--picture`, and prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(prog="spin-ray bench memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="shape of the model; its vocabulary is replaced")
    parser.add_argument("--pack-tokens", type=int, default=256)
    parser.add_argument("--points", type=int, default=99, help="only the first points of every sweep")
    parser.add_argument("--picture", type=Path, help="PNG to draw, for example docs/learner_memory.png")
    options = parser.parse_args(argv)
    measured: dict[Point, float] = {}
    print("| sweep | vocabulary | tokens per answer | pairs | peak GiB | logits of the batch, GiB |\n|---|---|---|---|---|---|")
    for name, points in SWEEPS.items():
        for point in points[: options.points]:
            if point not in measured:
                measured[point] = measure(point, model=options.model, pack_tokens=options.pack_tokens)
            row = (name, f"{point.vocabulary:,}", point.answer_tokens, point.pairs, f"{measured[point]:.2f}", f"{point.logits_gib:.2f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    if options.picture:
        draw(measured, options.picture)
    print(json.dumps([{**asdict(point), "peak_gib": peak, "logits_gib": point.logits_gib} for point, peak in measured.items()]))
    return 0


def measure(point: Point, *, model: str, pack_tokens: int) -> float:
    """Peak GiB of one process that takes two optimizer steps of `point.pairs` pairs."""
    from spin_ray.bench import workload
    from spin_ray.bench.contestants import Settings
    from spin_ray.bench.learner import take_turns

    settings = Settings(
        device="cpu", dtype="float32", batch_pairs=point.pairs, optimizer="adamw", lr=1e-4, beta=0.1, grad_clip=1.0,
        checkpointing=False, pack_tokens=pack_tokens, trl_batch=1, trl_best_batch=1,
    )
    lengths = workload.Lengths(prompt_median=64, answer_median=point.answer_tokens, sigma=0.0)
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as name:
        folder = Path(name)
        workload.save_model(folder / "model", model, vocab_size=point.vocabulary)
        workload.save_pairs(folder / "pairs.parquet", workload.random_pairs(2 * point.pairs, vocab_size=point.vocabulary, lengths=lengths))
        (folder / "bench.json").write_text(json.dumps(asdict(settings)))
        return take_turns(folder, ["ours"], 2, "cpu")["ours"][-1]["peak_gib"]


def draw(measured: dict[Point, float], path: Path) -> None:
    """One panel per sweep: our peak, and the logits of the batch for comparison."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SWEEPS), figsize=(12, 3.6), sharey=True)
    for panel, (name, points) in zip(panels, SWEEPS.items(), strict=True):
        points = [point for point in points if point in measured]
        x = [getattr(point, name.replace(" ", "_")) for point in points]
        panel.plot(x, [measured[point] for point in points], "o-", label="spin_ray, whole process")
        panel.plot(x, [point.logits_gib for point in points], "x--", label="float32 logits of the batch alone")
        panel.set(xlabel=name, ylim=(0, 3))
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("GiB")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
