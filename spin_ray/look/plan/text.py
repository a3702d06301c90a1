"""A plan in words: short tables, and every formula with its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

from spin_ray.look.plan.memory_text import changes, fits, hosts, learner, samplers
from spin_ray.look.plan.plan import Plan
from spin_ray.look.plan.sizes import count
from spin_ray.look.plan.tables import duration, table
from spin_ray.look.plan.times import FORWARD_SHARE, Iteration


def in_words(plan: Plan) -> list[str]:
    sections = (_known, _resources, learner, samplers, hosts, fits, changes, _rates, _times, _cost)
    return list(chain.from_iterable(section(plan) for section in sections))


def _known(plan: Plan) -> Iterator[str]:
    model, texts = plan.shapes.model, plan.inputs.texts
    yield f"Plan of run {plan.config.run.name} ({plan.config.method}). Nothing is started."
    yield f"  model   {plan.inputs.path}: {count(model.total)} weights, {count(model.trained)} trained ({plan.inputs.source})"
    yield f"  data    {texts.source}"
    yield f"          on average {texts.prompt:.0f} + {texts.answer:.0f} tokens, the longest pair at most {texts.longest_pair}"
    if plan.job.plays:
        cut = " cut at sampler.max_new_tokens" if plan.job.generated < plan.job.answer else ""
        yield f"          the opponent's answers are taken to be as long as the real ones{cut}: {plan.job.generated:.0f} tokens"
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
    yield from table(rows)


def _times(plan: Plan) -> Iterator[str]:
    first, pair = plan.iterations[0], plan.job.pair
    yield "Time"
    epochs, own = plan.job.epochs[0], plan.job.scorer in ("frozen", "learner")
    passes = f"({epochs} epochs + {FORWARD_SHARE:.2f} for its own reference)" if own else f"{epochs} epochs"
    by = f"{first.pairs:,} pairs × {pair:.0f} tokens × {passes} / {plan.speeds.learner.value:,.0f} tokens/s"
    yield f"  training of iteration 0: {by} = {duration(first.train_s)}"
    rows = [["iteration", "pairs", "training", "play", "evaluation", "sync", "in all", "replicas to hide play"]]
    yield from table([*rows, *map(_row, plan.iterations)])
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
