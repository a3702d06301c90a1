"""From a run's settings to the memory of one rank of the main player, and of one GPU or process of an opponent's replica."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spin_ray.config import Config
from spin_ray.look.plan.activations import Activations, Row
from spin_ray.look.plan.memory import learner_parts
from spin_ray.look.plan.rows import Texts
from spin_ray.look.plan.shapes import Shapes
from spin_ray.look.plan.sizes import GIB, Layout, Part, Work
from spin_ray.placement import MEMORY_SHARE, Hardware

LEARNER_BASE, SAMPLER_BASE = 0.70 * GIB, 0.9 * GIB
"""Resident memory of a process on a CPU that has started and knows no model: Python, Ray, torch, DeepSpeed; the same with vLLM. Measured in
runs of the demo, whose model takes next to nothing.
"""
CACHE_ON_CPU = 1.0 * GIB
"""What vLLM is told to take there (placement.py)."""
BATCH_ON_CPU = 2048
"""Tokens whose logits vLLM has at a time there."""
ENGINE_BYTES = 2.0 * GIB
"""Assumed: what vLLM takes of a GPU beside weights and cache, for its widest batch and its CUDA graphs."""
CONTEXT_BYTES = 1.5 * GIB
"""Assumed: what CUDA, NCCL and the matrix library take of a GPU beside torch's allocator."""


@dataclass(frozen=True)
class Learner:
    """What a rank of the main player takes."""

    parts: list[Part]
    counted: bool
    """Whether activations were counted, not reckoned."""
    row: Row
    longest: bool
    """Whether the longest pair, which has a row of its own and is computed again, sets the peak."""

    @property
    def peak(self) -> float:
        return sum(part.num_bytes for part in self.parts)


def learner_of(config: Config, hardware: Hardware, shapes: Shapes, texts: Texts, *, base: float | None = None) -> Learner:
    """At its peak. `base`: of a process that has only started, where it is not the worker of a run."""
    layout, on_gpu = layout_of(config, hardware, shapes), hardware.device == "cuda"
    base = (LEARNER_BASE if base is None else base) * (not on_gpu)
    alone, new = config.method == "sft", config.sampler.max_new_tokens
    in_step = texts.largest_batch(config.learner.batch_pairs, new, alone=alone) / layout.workers
    found = []
    for tokens, longest in ((min(in_step, config.learner.pack_tokens), False), (texts.longest_pair, True)):
        if longest and tokens <= config.learner.pack_tokens:
            continue
        row = texts.row(tokens, max_new_tokens=new, share_prompt=hardware.share_prompt, alone=alone)
        if longest:
            row = Row(1.0, tokens * row.trunk / row.tree_tokens, tuple(tokens * branch / row.tree_tokens for branch in row.branches))
        kept, counted = shapes.activations(row, on_gpu=on_gpu)
        work = work_of(kept, row, shapes, hardware, rows_per_step=in_step / tokens)
        parts = learner_parts(shapes.model, replace(layout, recompute=layout.recompute or longest), work, base=base)
        found.append(Learner(parts, counted, row, longest))
    return max(found, key=lambda one: one.peak)


def travels(config: Config, shapes: Shapes) -> int:
    """Weights that go from the learner to the samplers: an adapter's alone, or all."""
    model = shapes.model
    return model.trained if model.trained < model.total and config.lora.sync == "adapter" else model.total


def layout_of(config: Config, hardware: Hardware, shapes: Shapes) -> Layout:
    learner = config.learner
    frozen = config.scorer == "frozen" and config.method != "sft"
    mixed = config.method == "spin" and config.spin.base_share > 0 and frozen
    return Layout(
        on_gpu=hardware.device == "cuda", weight_bytes=2 if hardware.dtype == "bfloat16" else 4, workers=learner.fewest,
        zero_stage=learner.zero_stage, optimizer=learner.optimizer, offload=learner.offload_optimizer, copies=frozen + mixed,
        recompute=learner.activation_checkpointing,
        published=travels(config, shapes) if config.method == "spin" and config.spin.num_iterations > 1 else 0,
    )


def work_of(kept: Activations, row: Row, shapes: Shapes, hardware: Hardware, *, rows_per_step: float) -> Work:
    logits = 4 * min(hardware.logits_elements, row.answer_tokens * shapes.vocabulary)
    return Work(kept.layers, kept.largest_layer, kept.layer_inputs, kept.around, kept.widest, logits, rows_per_step)


@dataclass(frozen=True)
class Sampler:
    """What a GPU of an opponent's replica takes, or its process on a CPU."""

    weights: float
    """Bytes, of one GPU."""
    beside: float
    """What is neither weights nor cache."""
    cache_per_token: float
    """Bytes, of one GPU."""
    wanted_tokens: int
    """So that all answers that are written at a time have room."""
    longest: int
    """Tokens of the longest prompt with its answer: without room for one the engine does not start."""
    share: float
    """Of a GPU's memory, that the engine takes in all."""
    scores: float
    """Bytes of a CPU's memory while log-probs of given texts are computed."""
    comes: float
    """Bytes of new weights, which lie in the object store."""

    def cache_tokens(self, memory: float) -> int:
        """That a GPU of so many bytes has room for."""
        return max(0, int((self.share * memory - self.weights - self.beside) / self.cache_per_token))

    def on_cpu(self) -> float:
        """Weights with the pages of the file that they are read from."""
        return SAMPLER_BASE + CACHE_ON_CPU + 2 * self.weights + self.scores + self.comes


def sampler_of(config: Config, hardware: Hardware, shapes: Shapes, texts: Texts, *, memory: float, shared: bool) -> Sampler:
    """`memory`: of the GPU, bytes. Of weights in 4 bits the engine holds what they stand for."""
    w, ranks = 2 if hardware.dtype == "bfloat16" else 4, config.sampler.tensor_parallel_size
    base = shapes.model.total - (shapes.model.trained if config.lora.rank else 0)
    adapter = shapes.model.trained * config.lora.rank > 0 and config.lora.sync == "adapter"
    heads = max(1.0, shapes.kv_heads / ranks) / shapes.kv_heads
    answer = texts.generated(config.sampler.max_new_tokens)
    at_a_time = min(config.sampler.max_num_seqs, texts.num_prompts)
    share = min(MEMORY_SHARE, 1 - CONTEXT_BYTES / memory) if shared else MEMORY_SHARE
    return Sampler(
        weights=(base * w + adapter * shapes.model.trained * w) / ranks, beside=ENGINE_BYTES,
        cache_per_token=shapes.kv_bytes(w) * heads, wanted_tokens=round(at_a_time * (texts.prompt + answer)),
        longest=round(texts.longest_pair - texts.answer), share=config.sampler.gpu_memory_utilization or share,
        scores=2 * BATCH_ON_CPU * shapes.vocabulary * 4.0, comes=travels(config, shapes) * w,
    )

