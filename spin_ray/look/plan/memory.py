"""How much memory one rank of the learner takes, part by part. Arithmetic alone: no torch, no model, no machine.

A step has moments at which different things lie in memory; the peak is that of the largest moment, and the sum of its parts:

| moment | beside weights, master weights, moments and the frozen copy |
|---|---|
| backward | all activations, the chunk of logits, the gradients that earlier rows of the step have left |
| gradients | one layer's activations, all gradients |
| step | gradients, what the optimizer puts beside them |

N: weights of the model; n: those that are trained; G: workers; w: bytes of a weight, 4 or 2. What DeepSpeed keeps follows its code
(0.19.8), what was measured stands in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from spin_ray.look.plan.sizes import Layout, Model, Part, Work, count, size

NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in 4 bits: its code, and one float32 for every 64 (quantized.py)."""
MOMENT_BYTES = {"rmsprop": 4.0, "adamw": 8.0, "adamw_8bit": 2 + 8 / 256}
"""Of a trained weight; in 8 bits a float32 for every block of 256 and moment."""
BUCKET = 50_000_000
"""Gradients that ZeRO sends together (engine.py)."""
LIVE = 1_000_000_000
"""Weights that ZeRO-3 lets stay gathered, DeepSpeed's stage3_max_live_parameters."""
HELD_SHARE = 0.12
"""On a CPU: of what is allocated, that malloc holds beside it, because what is freed lies between what is not."""
BITSANDBYTES = 0.2 * 2**30
"""Resident memory of its libraries on a CPU."""
HELD_BY_ADAPTER = 1.0
"""The same of the layers' activations, more, where an adapter is trained."""
SUB_GROUP = 1_000_000_000
"""Weights that ZeRO-3 steps at a time."""


def learner_parts(model: Model, layout: Layout, work: Work, *, base: float = 0.0) -> list[Part]:
    """The parts at the learner's peak. `base`: bytes of a process that has only started; on a GPU what no allocator counts is left out."""
    parts, w = max(moments(model, layout, work).values(), key=total), layout.weight_bytes
    if layout.on_gpu:
        return parts
    published = Part("new weights in the object store", w * layout.published, f"{count(layout.published)} × {w} B")
    return [
        Part("the process with its libraries", base, "measured"), *_bitsandbytes(model, layout), *parts,
        _held(model, work, total(parts)), published,
    ]


def _bitsandbytes(model: Model, layout: Layout) -> Iterator[Part]:
    """On a CPU. Weights are read before they are put into 4 bits, and malloc holds what they took."""
    if model.in_4_bits or layout.optimizer == "adamw_8bit":
        yield Part("bitsandbytes' libraries", BITSANDBYTES, "measured")
    if model.in_4_bits:
        read = layout.weight_bytes * model.in_4_bits
        yield Part("weights before they were in 4 bits", read, f"{count(model.in_4_bits)} × {layout.weight_bytes} B")


def _held(model: Model, work: Work, allocated: float) -> Part:
    """On a CPU. Where an adapter is trained, what frozen layers put out is freed between activations that stay."""
    formula = f"{HELD_SHARE:g} × {size(allocated)}"
    if model.head_is_trained:
        return Part("freed, but held by malloc", HELD_SHARE * allocated, f"{formula}; the factor is measured")
    held = HELD_SHARE * allocated + HELD_BY_ADAPTER * work.layers
    return Part("freed, but held by malloc", held, f"{formula} + {HELD_BY_ADAPTER:g} × {size(work.layers)}; the factors are measured")


def moments(model: Model, layout: Layout, work: Work) -> dict[str, list[Part]]:
    """Every moment's parts."""
    always, earlier = [*_kept(model, layout), *_logits(model, layout, work)], work.rows_per_step > 1
    gathered = list(_gathered(model, layout))
    return {
        "backward": [*always, *gathered, *_gradients(model, layout, whole=earlier), *_activations(layout, work)],
        "gradients": [*always, *gathered, *_gradients(model, layout, whole=True), *_one_layer(work)],
        "step": [*always, *_gradients(model, layout, whole=True), *_stepping(model, layout)],
    }


def total(parts: list[Part]) -> float:
    return sum(part.num_bytes for part in parts)


def _kept(model: Model, layout: Layout) -> Iterator[Part]:
    """What lies there from the first step on."""
    w, shards = layout.weight_bytes, layout.shards
    ranks = layout.workers if layout.zero_stage == 3 else 1
    plain = model.total - model.in_4_bits
    formula = f"{count(plain)} × {w} B" + (f" / {ranks}" if ranks > 1 else "")
    if model.in_4_bits:
        formula += f" + {count(model.in_4_bits)} × {NF4_BYTES:.4g} B"
    yield Part("weights", (plain * w + model.in_4_bits * NF4_BYTES) / ranks, formula)
    on_host = layout.offload and layout.on_gpu
    if (layout.zero_stage or w == 2) and not on_host:
        yield Part("master weights, float32", 4 * model.trained / shards, f"{count(model.trained)} × 4 B{_over(shards)}")
    if not on_host:
        each = MOMENT_BYTES[layout.optimizer]
        yield Part(f"{layout.optimizer}'s moments", each * model.trained / shards, f"{count(model.trained)} × {each:.3g} B{_over(shards)}")
    if layout.copies:
        held = layout.copies * model.trained * w / ranks
        yield Part("frozen copy of theta_t", held, f"{layout.copies} × {count(model.trained)} × {w} B{_over(ranks)}")
    if model.in_4_bits:
        yield Part("a layer's weights out of 4 bits", model.largest * w, f"{count(model.largest)} × {w} B")


def _gathered(model: Model, layout: Layout) -> Iterator[Part]:
    """What ZeRO-3 brings together for the forward and the backward pass."""
    if layout.zero_stage == 3:
        formula = f"min({count(model.total)}, {count(LIVE)} + a layer) × {layout.weight_bytes} B"
        yield Part("weights that ZeRO-3 has gathered", min(model.total, LIVE + model.layer) * layout.weight_bytes, formula)


def _gradients(model: Model, layout: Layout, *, whole: bool) -> Iterator[Part]:
    """`whole`: those of all weights are there; else the output layer's alone, which come first."""
    stage, w, n, shards = layout.zero_stage, layout.weight_bytes, model.trained, layout.shards
    if stage == 0:
        yield Part("gradients", w * n if whole else 0, f"{count(n)} × {w} B")
        return
    if stage == 1 and w == 2 and not layout.offload:
        yield Part("gradients, float32", 4 * n, f"{count(n)} × 4 B")
    elif not (layout.offload and layout.on_gpu):
        summed = 4 * n / shards if whole or stage == 3 else 0
        yield Part("gradients, float32", summed, f"{count(n)} × 4 B{_over(shards)}")
    bucket = BUCKET if layout.on_gpu else min(BUCKET, n)
    ranks, held = shards if stage == 2 else 1, min(BUCKET, n) if stage == 3 else n
    yield Part("gradients of the row at work", w * held / ranks if whole else 0, f"{count(held)} × {w} B{_over(ranks)}")
    yield Part("bucket of gradients to send", bucket * w, f"{count(bucket)} × {w} B")


def _activations(layout: Layout, work: Work) -> Iterator[Part]:
    if layout.recompute:
        yield Part("activations between layers", work.layer_inputs, "counted")
        yield Part("activations of one layer, computed again", work.largest_layer, "counted")
    else:
        yield Part("activations of all layers", work.layers, "counted")
    yield Part("activations around the layers", work.around, "counted")
    yield Part("gradients of activations", 3 * work.widest, f"3 × {size(work.widest)}")


def _one_layer(work: Work) -> Iterator[Part]:
    yield Part("activations of one layer", work.largest_layer, "counted")
    yield Part("gradients of activations", 3 * work.widest, f"3 × {size(work.widest)}")


def _logits(model: Model, layout: Layout, work: Work) -> Iterator[Part]:
    """The chunk, its copies in half precision, and the output layer's gradient, which is summed in float32 and kept (logps.py)."""
    copies = 2 if layout.weight_bytes == 2 else 1
    yield Part("chunk of logits", copies * work.logits, f"{copies} × {size(work.logits)}")
    if model.head_is_trained and (layout.zero_stage or layout.weight_bytes == 2):
        yield Part("the output layer's gradient", 4 * model.head, f"{count(model.head)} × 4 B")


def _stepping(model: Model, layout: Layout) -> Iterator[Part]:
    """What the optimizer puts beside the gradients."""
    n = model.trained / layout.shards
    if layout.offload and layout.on_gpu:
        return
    flat = min(n, SUB_GROUP) if layout.zero_stage == 3 else n
    if layout.zero_stage or layout.weight_bytes == 2:
        yield Part("gradients in one tensor", 4 * flat, f"{count(flat)} × 4 B")
    if layout.optimizer == "rmsprop":
        flat = flat if layout.zero_stage or layout.on_gpu else model.largest
        yield Part("square roots of the moments", 4 * flat, f"{count(flat)} × 4 B")


def _over(ranks: int) -> str:
    return f" / {ranks}" if ranks > 1 else ""
