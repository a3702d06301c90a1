"""Log-probs of answer tokens without ever holding [tokens, vocabulary] of a whole batch.

The output layer runs over chunks of the answer tokens only. d logp / d logits is softmax - onehot(target) times one
number per token, so the forward pass already multiplies it with the weight (the gradient of `hidden` but for that
number) and the backward pass only scales rows of [A, D]: nothing but the softmax itself touches every logit. A chunk's
logits become its softmax in place, in one buffer that lives as long as the head; the chunk that it holds when the
backward pass begins, the last one, is not computed again. With no more answer tokens than one chunk has, nothing is.

Memory: one chunk of logits, whatever the batch. Shapes: A answer tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spin_ray.learner.packing import Packed

CHUNK_ELEMENTS = 12 * 2**20
"""Logits held at a time: 48 MiB in float32."""
SMALLEST = 1e-30
"""A softmax below this is near underflow (float32 ends at 1e-38): its logarithm is computed from the logits instead."""


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, buffers: list[torch.Tensor], chunk: int, train: bool
    ) -> torch.Tensor:
        buffer = _take(buffers, min(chunk, len(targets)), weight)
        logps = hidden.new_empty(len(targets), dtype=buffer.dtype)
        unit_grads = torch.empty_like(hidden) if train else None
        softmax = None
        for part in _parts(len(targets), chunk):
            softmax = _softmax_less_onehot(hidden[part], weight, targets[part], buffer, logps[part])
            if train:
                torch.mm(softmax, weight, out=unit_grads[part])
        if train:
            ctx.save_for_backward(hidden, weight, targets, unit_grads)
            ctx.buffers, ctx.chunk = buffers, chunk
            ctx.held = (buffer, softmax)  # for one backward pass: it writes over it
        else:
            buffers.append(buffer)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, unit_grads = ctx.saved_tensors
        buffer, softmax = ctx.held or (_take(ctx.buffers, min(ctx.chunk, len(targets)), weight), None)
        ctx.held = None
        scale = -grad[:, None]
        scaled = (hidden * scale).to(weight.dtype)
        # Many chunks add up here: never in half precision.
        grad_weight = None
        for part in reversed(_parts(len(targets), ctx.chunk)) if ctx.needs_input_grad[1] else ():
            if softmax is None:
                softmax = _softmax_less_onehot(hidden[part], weight, targets[part], buffer)
            if grad_weight is None:
                grad_weight = (softmax.T @ scaled[part]).to(grad.dtype)
            elif weight.dtype == grad.dtype:
                grad_weight.addmm_(softmax.T, scaled[part])
            else:
                grad_weight += softmax.T @ scaled[part]
            softmax = None
        ctx.buffers.append(buffer)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return (unit_grads * scale).to(hidden.dtype), grad_weight, None, None, None, None


def _take(buffers: list[torch.Tensor], rows: int, weight: torch.Tensor) -> torch.Tensor:
    """A buffer [>= rows, V] that no other pass is using; a new one only if there is none, for page faults cost more than the softmax."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    while buffers:
        buffer = buffers.pop()
        if len(buffer) >= rows and buffer.dtype == dtype:
            return buffer
    return torch.empty(rows, weight.shape[0], dtype=dtype, device=weight.device)


def _softmax_less_onehot(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor, logps: torch.Tensor | None = None
) -> torch.Tensor:
    """[C, V] in the weight's dtype, a view of `buffer` where that has it; writes log p of the targets to `logps` [C]."""
    logits = buffer[: len(targets)]
    if weight.dtype == buffer.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    torch.softmax(logits, dim=1, out=logits)
    if logps is not None:
        at_target = logits.gather(1, targets[:, None])[:, 0]
        torch.log(at_target, out=logps)
        rare = (at_target < SMALLEST).nonzero()[:, 0]
        if len(rare):
            again = torch.log_softmax((hidden[rare] @ weight.T).to(logps.dtype), dim=1)
            logps[rare] = again.gather(1, targets[rare, None])[:, 0]
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    return logits.to(weight.dtype)


def _parts(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


class LogpHead(nn.Module):
    """An output layer that answers with log-probs of given tokens instead of logits; shares the layer's weight [V, D]."""

    def __init__(self, linear: nn.Linear, *, chunk_elements: int | None = None):
        super().__init__()
        self.weight = linear.weight
        self._chunk_elements = chunk_elements or CHUNK_ELEMENTS
        self._free: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [A, D], targets [A] -> log p of each target, [A], float32 (float64 for a float64 model), in nats."""
        chunk = max(1, self._chunk_elements // self.weight.shape[0])
        return _ChunkedLogps.apply(hidden, self.weight, targets, self._free, chunk, torch.is_grad_enabled())


class PolicyLogps(nn.Module):
    """A causal language model as the function SPIN needs: a packed row -> log-probs of its answer tokens."""

    def __init__(self, lm: nn.Module, *, chunk_elements: int | None = None):
        super().__init__()
        lm.lm_head = LogpHead(lm.lm_head, chunk_elements=chunk_elements)
        self.lm = lm

    def forward(self, packed: Packed) -> torch.Tensor:
        """Returns [A] log-probs in nats; prompt positions never reach the output layer."""
        out = self.lm.base_model(
            input_ids=packed.input_ids[None], position_ids=packed.position_ids[None], packed=packed, use_cache=False
        )
        return self.lm.lm_head(out.last_hidden_state[0, packed.predictor], packed.targets)
