"""What to change where a player does not fit, in the order of least harm, with what the learner takes after each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from spin_ray.config import Config


@dataclass(frozen=True)
class Change:
    """One setting, on top of those before it."""

    setting: str
    costs: str
    peak: float
    """Bytes of a rank of the learner with it."""


WORTH = 0.97
"""A change that leaves more of the peak is not worth naming."""
FEWEST_TOKENS = 1024
"""Rows below that leave a device idle."""


def changes(config: Config, peak: Callable[[Config], float], *, room: float) -> Iterator[Change]:
    """One after the other, until the learner fits into `room` bytes or nothing is left to change. What helps nothing is left out."""
    now = peak(config)
    for setting, costs, changed in _in_order(config):
        if now <= room:
            return
        after = peak(changed(config))
        if after < WORTH * now:
            config, now = changed(config), after
            yield Change(setting, costs, after)


def _in_order(config: Config) -> Iterator[tuple[str, str, Callable[[Config], Config]]]:
    learner = config.learner
    if not learner.activation_checkpointing:
        yield "learner.activation_checkpointing=true", "about a third more computing", _learner(activation_checkpointing=True)
    stages = range(learner.zero_stage + 1, 4) if learner.fewest > 1 else ()
    for stage in stages:
        yield f"learner.zero_stage={stage}", "more traffic between the workers", _learner(zero_stage=stage)
    if config.scorer == "frozen":
        yield "reference.scorer=opponent", "the engines' difference in the reference", lambda config: replace(
            config, reference=replace(config.reference, scorer="opponent"))
    tokens = learner.pack_tokens // 2
    while tokens >= FEWEST_TOKENS:
        yield f"learner.pack_tokens={tokens}", "smaller rows, a few percent of speed", _learner(pack_tokens=tokens)
        tokens //= 2
    if learner.zero_stage and not learner.offload_optimizer:
        yield "learner.offload_optimizer=true", "a slower step, on the host's cores", _learner(offload_optimizer=True)
    if not config.lora.rank:
        yield "lora.rank=16", "an adapter is trained, not all weights", _with_adapter
    if not config.model.quantization:
        yield "model.quantization=nf4", "the base is rounded to 4 bits (needs an adapter)", _in_4_bits


def _learner(**values: object) -> Callable[[Config], Config]:
    return lambda config: replace(config, learner=replace(config.learner, **values))


def _with_adapter(config: Config) -> Config:
    """The optimizer's few states may stay on the device then."""
    return replace(config, lora=replace(config.lora, rank=16), learner=replace(config.learner, offload_optimizer=False))


def _in_4_bits(config: Config) -> Config:
    adapted = config if config.lora.rank else _with_adapter(config)
    stage = min(adapted.learner.zero_stage, 2)
    return replace(adapted, model=replace(adapted.model, quantization="nf4"), learner=replace(adapted.learner, zero_stage=stage))
