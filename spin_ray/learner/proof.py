"""The learner's way of computing log-probs beside transformers' own, on the same weights: a packed row against one answer at a time.

One comparison covers what packing can get wrong: state that leaks from answer to answer, attention arguments that are not
heeded, windows, noise that is still on, what a family does to its logits. The driver's proof and `bench models` both use it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spin_ray.errors import BadInput
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.packing import pack
from spin_ray.records import Pair


@dataclass(frozen=True)
class Tolerance:
    """How far the two may be apart: the largest and the mean difference of a token's log-prob in nats, a gradient's relatively."""

    max_nats: float
    mean_nats: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(1e-4, 1e-5, 1e-3),  # norms compute in float32
    torch.float32: Tolerance(5e-3, 5e-4, 2e-2),
    torch.bfloat16: Tolerance(2.0, 0.1, 0.5),  # 8 bits: a logit of 20 is off by 0.06, and rare tokens have larger ones
    torch.float16: Tolerance(0.5, 0.02, 0.2),
}
"""For whole models: rounding adds up with depth. Answers that see each other are apart by 0.05 nats to 3 on average."""
NUM_PARAMETERS = 6
"""Parameters whose gradients are compared at the door: spread over the model, from its first to its last."""
EXACT = Tolerance(5e-5, 1e-5, 5e-4)
"""For a model of a few layers in float32."""


@dataclass(frozen=True)
class Facts:
    """What a comparison found. Differences are |packed - plain|."""

    num_tokens: int
    max_nats: float
    mean_nats: float
    gradient: float
    """Largest relative difference of a parameter's gradient; 0 where none was computed."""
    parameter: str
    """The parameter that it belongs to."""
    seconds: float

    def within(self, tolerance: Tolerance) -> bool:
        found = (self.max_nats, self.mean_nats, self.gradient)
        return all(value <= most for value, most in zip(found, (tolerance.max_nats, tolerance.mean_nats, tolerance.gradient), strict=True))

    def check(self, tolerance: Tolerance, name: str) -> None:
        """Raise BadInput naming the model if they are further apart."""
        if not self.within(tolerance):
            allowed = f"{tolerance.max_nats:g} and {tolerance.mean_nats:g} nats, {tolerance.gradient:g}"
            raise BadInput(
                f"{name}: a packed row does not give what plain transformers gives for one answer at a time: {self} (allowed {allowed}); "
                "this model cannot be trained here, docs/models.md lists the families that can"
            )

    def __str__(self) -> str:
        gradient = f", gradients by {self.gradient:.1e} ({self.parameter})" if self.parameter else ""
        return f"{self.num_tokens} tokens: log-probs apart by {self.max_nats:.1e} nats at most, {self.mean_nats:.1e} on average{gradient}"


def compare(policy: PolicyLogps, pairs: Sequence[Pair], *, share_prompt: bool, num_parameters: int | None = NUM_PARAMETERS) -> Facts:
    """Log-probs of all answer tokens of `pairs`, and the gradient of some parameters (None: of all), packed and plain.

    Both run where the model's input embedding lies. With num_parameters=0 nothing but forward calls of `policy` and of the
    model in it happens: so it also serves the module of a DeepSpeed engine, under ZeRO-3 on all ranks alike. Else before
    `deepspeed.initialize`. Leaves no gradient, and every mode and flag as it was.
    """
    begun = time.perf_counter()
    parameters = _some(policy.lm, num_parameters)
    with torch.set_grad_enabled(bool(parameters)):
        ours, our_gradients = _packed(policy, pairs, share_prompt, list(parameters.values()))
        plain, plain_gradients = _plain(policy, pairs, list(parameters.values()))
    differences = (ours - plain).abs()
    gradient, parameter = _worst(list(parameters), our_gradients, plain_gradients)
    return Facts(
        len(plain), _number(differences.max()), _number(differences.mean()), gradient, parameter, time.perf_counter() - begun
    )


def _number(value: torch.Tensor) -> float:
    """Infinite where it is not a number: nothing is within a tolerance then."""
    return float(value) if torch.isfinite(value) else float("inf")


def _some(lm: nn.Module, count: int | None) -> dict[str, nn.Parameter]:
    """So many trainable parameters, spread evenly over the model; all for None."""
    every = [(name, p) for name, p in lm.named_parameters() if p.requires_grad]
    if count is None or count >= len(every):
        return dict(every)
    return dict(every[k] for k in np.linspace(0, len(every) - 1, count).astype(int))


def _packed(
    policy: PolicyLogps, pairs: Sequence[Pair], share_prompt: bool, parameters: list[nn.Parameter]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs answer by answer, [A] float64, and the gradients of `_objective`."""
    packed = pack(pairs, share_prompt=share_prompt).to(_device(policy.lm))
    head = policy.head
    accumulate, head.accumulate = head.accumulate, False
    try:
        logps = policy(packed)
        return logps.detach().double(), _gradients(_objective(logps), parameters)
    finally:
        head.accumulate = accumulate


def _plain(policy: PolicyLogps, pairs: Sequence[Pair], parameters: list[nn.Parameter]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same by transformers, one answer at a time."""
    logps, totals, place = [], [torch.zeros_like(p) for p in parameters], 0
    with as_transformers_means_it(policy.lm):
        for pair in pairs:
            for answer in pair.answers:
                if len(answer):
                    one = plain_logps(policy.lm, pair.prompt_ids, answer)
                    totals = [a + b for a, b in zip(totals, _gradients(_objective(one, place), parameters), strict=True)]
                    logps.append(one.detach().double())
                    place += len(answer)
    return torch.cat(logps), totals


def plain_logps(lm: nn.Module, prompt_ids: np.ndarray, answer_ids: np.ndarray) -> torch.Tensor:
    """Log-probs of an answer's tokens, [len(answer)] at least float32, in nats: one row, one forward pass of transformers."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, answer_ids]).astype(np.int64)).to(_device(lm))
    logits = lm(input_ids=ids[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, dim=-1).gather(1, ids[len(prompt_ids) :, None])[:, 0]


@contextmanager
def as_transformers_means_it(lm: nn.Module) -> Iterator[None]:
    """While the body runs: evaluation mode, and transformers' own eager attention."""
    modes = {module: module.training for module in lm.modules()}
    implementation = lm.config._attn_implementation
    lm.eval()
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(implementation)
        for module, training in modes.items():
            module.training = training


def _objective(logps: torch.Tensor, place: int = 0) -> torch.Tensor:
    """A sum in which every token weighs something else, so that no two of their gradients can be exchanged unnoticed."""
    return (torch.cos(torch.arange(place, place + len(logps), device=logps.device)) * logps).sum()


def _gradients(value: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    if not parameters:
        return []
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _worst(names: list[str], ours: list[torch.Tensor], plain: list[torch.Tensor]) -> tuple[float, str]:
    """The largest |difference| / |gradient| and its parameter. A gradient that is noise counts as 1e-3 of the largest."""
    if not names:
        return 0.0, ""
    norms = [g.float().norm() for g in plain]
    floor = 1e-3 * max(norms)
    off = [_number((a - b).float().norm() / torch.maximum(n, floor)) for a, b, n in zip(ours, plain, norms, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    return off[worst], names[worst]


def _device(lm: nn.Module) -> torch.device:
    return lm.get_input_embeddings().weight.device
