"""A plan in words: short tables, and every formula with its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from spin_ray.look.plan.memory import GIB, count, size
from spin_ray.look.plan.plan import Fit, Plan
from spin_ray.look.plan.players import CONTEXT_BYTES, ENGINE_BYTES, SAMPLER_BASE
from spin_ray.look.plan.times import Iteration

NOT_ON_A_GPU = "not measured on a GPU: what a GPU takes is reckoned"


def in_words(plan: Plan) -> list[str]:
    sections = (_known, _resources, _learner, _samplers, _fits, _changes, _rates, _times, _cost)
    return list(chain.from_iterable(section(plan) for section in sections))


def _known(plan: Plan) -> Iterator[str]:
    model, texts = plan.shapes.model, plan.inputs.texts
    yield f"Plan of run {plan.config.run.name} ({plan.config.method}). Nothing is started."
    yield f"  model   {plan.inputs.path}: {count(model.total)} weights, {count(model.trained)} trained ({plan.inputs.source})"
    yield f"  data    {texts.source}; on average {texts.prompt:.0f} + {texts.answer:.0f} tokens, the longest pair {texts.longest_pair}"
    yield f"          the opponent's answers are taken to be as long as the real ones, {texts.generated(_new(plan)):.0f} tokens"
    yield f"  device  {plan.machine.source}; {plan.hardware.dtype}"


def _resources(plan: Plan) -> Iterator[str]:
    yield "Resources"
    for kind in plan.hardware.actors:
        if kind.number:
            shared = plan.hardware.takes_turns and kind.each.get("GPU")
            amounts = {**kind.each, "GPU": 1} if shared else kind.each
            each = ", ".join(f"{amount:g} {resource}" for resource, amount in amounts.items() if amount) + ", in turns" * bool(shared)
            where = f" on nodes with {dict(kind.selector)}" if kind.selector else ""
            yield f"  {kind}, each {each}{where}"
    yield "  driver, pool and coordinator: on the driver's node, no GPU"
    yield f"  placement: {_placement(plan)}"


def _placement(plan: Plan) -> str:
    if plan.hardware.takes_turns:
        return f"shared: the players take turns on {plan.num_gpus:g} GPUs" if plan.num_gpus else "shared: the players take turns"
    auto = " (placement.mode=auto: on a cluster with one GPU they would take turns)" if plan.config.placement.mode == "auto" else ""
    if plan.num_gpus:
        return f"separate: {plan.num_gpus:g} GPUs, none of them shared{auto}"
    return "separate: both compute on CPUs, at the same time"


def _learner(plan: Plan) -> Iterator[str]:
    learner, gpu = plan.learner, plan.hardware.device == "cuda"
    yield f"Memory of one worker of the main player at its peak, {'GPU, torch allocator; ' + NOT_ON_A_GPU if gpu else 'resident'}"
    yield from _table([[part.name, size(part.num_bytes), part.formula] for part in learner.parts if part.num_bytes >= 2**20])
    small = sum(part.num_bytes for part in learner.parts if part.num_bytes < 2**20)
    yield f"  {'in all' + (f' (with {size(small)} of smaller parts)' if small else '')}: {size(learner.peak)}"
    what = "the longest pair, alone in its row and computed again" if learner.longest else "a full row"
    how = "counted on torch's meta device" if learner.counted else "reckoned from the layers' matrices: this family cannot be counted"
    yield f"  activations: of {what}, {learner.row.tokens:,} tokens, {how}"


def _samplers(plan: Plan) -> Iterator[str]:
    if not any(kind.who == "sampler" and kind.number for kind in plan.hardware.actors):
        return
    one = plan.fits[0].separate
    if not plan.hardware.sampler_gpus:
        yield f"Memory of one replica of the opponent, a process: about {size(one.on_cpu())}"
        yield f"  libraries {size(SAMPLER_BASE)} + weights {size(one.weights)} + cache 1 GiB"
        return
    ranks = plan.config.sampler.tensor_parallel_size
    yield f"Memory of one GPU of a replica of the opponent; {NOT_ON_A_GPU}"
    over = f" (a share of {ranks})" if ranks > 1 else ""
    yield f"  weights {size(one.weights)}{over}, beside weights and cache {size(ENGINE_BYTES)} (assumed)"
    at_a_time = min(plan.config.sampler.max_num_seqs, plan.inputs.texts.num_prompts)
    wanted = f"{one.wanted_tokens:,} tokens = {size(one.wanted_tokens * one.cache_per_token)}"
    yield f"  cache {one.cache_per_token / 2**10:.0f} KiB a token; {at_a_time} answers at a time want {wanted}"


def _fits(plan: Plan) -> Iterator[str]:
    if plan.hardware.device == "cpu":
        fit = plan.fits[0]
        workers, replicas = plan.config.learner.fewest, plan.config.sampler.fewest
        each, other = plan.learner.peak, fit.separate.on_cpu()
        need = size(workers * each + replicas * other)
        yield f"Does it fit? {workers} × {size(each)} + {replicas} × {size(other)} = {need} of {size(fit.memory)}"
        yield f"  if all of it is on this machine: {'yes' if fit.fits else 'no'}"
        return
    yield f"Does it fit? A worker takes {size(plan.learner.peak)} and about {size(CONTEXT_BYTES)} that CUDA and NCCL take (assumed)"
    rows = [["GPU", "learner", "sampler, separate", "sampler, shared (the learner rests)"]]
    yield from _table([*rows, *([f"{fit.memory / GIB:.0f} GiB", _yes(fit.fits), *_caches(fit)] for fit in plan.fits)])


def _yes(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def _caches(fit: Fit) -> Iterator[str]:
    for one in (fit.separate, fit.shared):
        tokens = one.cache_tokens(fit.memory)
        if tokens < one.longest:
            yield "does not fit: a larger sampler.tensor_parallel_size"
        else:
            full = "all answers at a time" if tokens >= one.wanted_tokens else f"{tokens / one.wanted_tokens:.0%} of the answers at a time"
            yield f"{one.share:.2f} of it: cache of {tokens:,} tokens, {full}"


def _changes(plan: Plan) -> Iterator[str]:
    for fit in plan.fits:
        if fit.fits:
            continue
        yield f"What to change for {fit.memory / GIB:.0f} GiB, each on top of those before it, least harm first"
        rows = [[change.setting, f"-> {size(change.peak)}", change.costs] for change in fit.changes]
        yield from _table(rows or [["nothing makes it smaller", "", "more workers with learner.zero_stage=3, or a smaller model"]])


def _rates(plan: Plan) -> Iterator[str]:
    speeds = plan.speeds
    yield "Rates"
    rows = [["main player", f"{speeds.learner.value:,.0f} tokens/s", speeds.learner.source]]
    if plan.iterations[0].play_s:
        rows += [
            ["a replica, writing", f"{speeds.sampler.value:,.0f} tokens/s", speeds.sampler.source],
            ["a replica, reading", f"{speeds.scorer.value:,.0f} tokens/s", speeds.scorer.source],
            ["new weights", f"{speeds.sync.value:,.1f} s", speeds.sync.source],
        ]
    yield from _table(rows)


def _times(plan: Plan) -> Iterator[str]:
    first, texts = plan.iterations[0], plan.inputs.texts
    pair = texts.pair(_new(plan))
    yield "Time"
    by = f"{first.pairs:,} pairs × {pair:.0f} tokens × epochs / {plan.speeds.learner.value:,.0f} tokens/s"
    yield f"  training of iteration 0: {by} = {duration(first.train_s)}"
    rows = [["iteration", "pairs", "training", "play", "evaluation", "sync", "in all", "replicas to hide play"]]
    yield from _table([*rows, *map(_row, plan.iterations)])
    needed = max(one.replicas_needed for one in plan.iterations)
    if needed:
        yield f"  replicas that keep play just hidden behind training: {math.ceil(needed - 1e-9)}; the run has {plan.config.sampler.fewest}"


def _row(one: Iteration) -> list[str]:
    times = [duration(seconds) for seconds in (one.train_s, one.play_s, one.evaluate_s, one.sync_s, one.wall_s)]
    return [str(one.number), f"{one.pairs:,}", *times, f"{one.replicas_needed:.2f}" if one.replicas_needed else "-"]


def _cost(plan: Plan) -> Iterator[str]:
    yield f"  in all {duration(plan.wall_s)} for {len(plan.iterations)} iterations, without start-up"
    if plan.num_gpus:
        hours = plan.num_gpus * plan.wall_s / 3600
        price = f" = {hours * plan.price:,.2f} at {plan.price:g} a GPU hour" if plan.price is not None else ""
        yield f"  {plan.num_gpus:g} GPUs × {duration(plan.wall_s)} = {hours:,.1f} GPU hours{price}"


def _new(plan: Plan) -> int:
    return plan.config.sampler.max_new_tokens


def _table(rows: Sequence[Iterable[str]]) -> Iterator[str]:
    cells = [list(row) for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    for row in cells:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()


def duration(seconds: float) -> str:
    """Worked: 5400 -> 1.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
