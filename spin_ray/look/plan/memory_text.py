"""The part of a plan's words that is about memory."""

from __future__ import annotations

from collections.abc import Iterator

from spin_ray.look.plan.memory import MOMENT_BYTES
from spin_ray.look.plan.plan import Fit, Plan, num_replicas
from spin_ray.look.plan.players import CONTEXT_BYTES, ENGINE_BYTES, SAMPLER_BASE
from spin_ray.look.plan.sizes import GIB, size
from spin_ray.look.plan.tables import table

NOT_ON_A_GPU = "not measured on a GPU: what a GPU takes is reckoned"


def learner(plan: Plan) -> Iterator[str]:
    learner, gpu = plan.learner, plan.hardware.device == "cuda"
    yield f"Memory of one worker of the main player at its peak, {'GPU, torch allocator; ' + NOT_ON_A_GPU if gpu else 'resident'}"
    yield from table([[part.name, size(part.num_bytes), part.formula] for part in learner.parts if part.num_bytes >= 2**20])
    small = sum(part.num_bytes for part in learner.parts if part.num_bytes < 2**20)
    yield f"  {'in all' + (f' (with {size(small)} of smaller parts)' if small else '')}: {size(learner.peak)}"
    what = "the longest pair, alone in its row and computed again" if learner.longest else "a full row"
    how = "counted on torch's meta device" if learner.counted else "reckoned from the layers' matrices: this family cannot be counted"
    yield f"  activations: of {what}, {learner.row.tokens:,} tokens, {how}"


def samplers(plan: Plan) -> Iterator[str]:
    if not num_replicas(plan.hardware):
        return
    one = plan.fits[0].separate
    if not plan.hardware.sampler_gpus:
        yield f"Memory of one replica of the opponent, a process: about {size(one.on_cpu())}"
        known = f"libraries {size(SAMPLER_BASE)} + cache 1 GiB + 2 × weights {size(one.weights)}"
        yield f"  {known} + log-probs of texts {size(one.scores)} + new weights {size(one.comes)}"
        return
    ranks = plan.config.sampler.tensor_parallel_size
    yield f"Memory of one GPU of a replica of the opponent; {NOT_ON_A_GPU}"
    over = f" (a share of {ranks})" if ranks > 1 else ""
    yield f"  weights {size(one.weights)}{over}, beside weights and cache {size(ENGINE_BYTES)} (assumed)"
    at_a_time = min(plan.config.sampler.max_num_seqs, plan.inputs.texts.num_prompts)
    wanted = f"{one.wanted_tokens:,} tokens = {size(one.wanted_tokens * one.cache_per_token)}"
    yield f"  cache {one.cache_per_token / 2**10:.0f} KiB a token; {at_a_time} answers at a time want {wanted}"


def hosts(plan: Plan) -> Iterator[str]:
    """What lies in the memory of hosts, where the players are on GPUs."""
    if plan.hardware.device == "cpu":
        return
    comes, learner = plan.fits[0].separate.comes, plan.config.learner
    yield "Memory of the hosts"
    if num_replicas(plan.hardware):
        yield f"  new weights {size(comes)} in /dev/shm, on the first worker's host and on every sampler's"
    if learner.offload_optimizer:
        each = (8 + MOMENT_BYTES[learner.optimizer]) * plan.shapes.model.trained / learner.fewest
        yield f"  master weights, moments and gradients of every worker: {size(each)}"
    if plan.hardware.takes_turns:
        rests = f"up to {size(plan.learner.peak)} of a worker, {size(plan.fits[0].shared.weights)} of a replica"
        yield f"  what a resting player had on its GPU: {rests}"


def fits(plan: Plan) -> Iterator[str]:
    if plan.hardware.device == "cpu":
        fit = plan.fits[0]
        players = [(plan.config.learner.fewest, plan.learner.peak), (num_replicas(plan.hardware), fit.separate.on_cpu())]
        sums = " + ".join(f"{number} × {size(each)}" for number, each in players if number)
        yield f"Does it fit? {sums} = {size(sum(number * each for number, each in players))} of {size(fit.memory)}"
        yield f"  if all of it is on this machine: {'yes' if fit.fits else 'no'}"
        return
    yield f"Does it fit? A worker takes {size(plan.learner.peak)} and about {size(CONTEXT_BYTES)} that CUDA and NCCL take (assumed)"
    rows = [["GPU", "learner", "sampler, separate", "sampler, shared (the learner rests)"]]
    yield from table([*rows, *([f"{fit.memory / GIB:.0f} GiB", _yes(fit.fits), *_caches(fit)] for fit in plan.fits)])


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


def changes(plan: Plan) -> Iterator[str]:
    for fit in plan.fits:
        if fit.fits:
            continue
        yield f"What to change for {fit.memory / GIB:.0f} GiB, each on top of those before it, least harm first"
        rows = [[change.setting, f"-> {size(change.peak)}", change.costs] for change in fit.changes]
        yield from table(rows or [["nothing makes it smaller", "", "more workers with learner.zero_stage=3, or a smaller model"]])
