"""Log-probs of answer tokens without ever holding [tokens, vocabulary] of a whole batch.

The output layer runs over chunks of the answer tokens only. The forward pass keeps one number per token; the backward
pass computes a chunk's logits again. Memory: one chunk of logits, whatever the batch.

Shapes: A answer tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spin_ray.learner.packing import Packed

CHUNK_ELEMENTS = 4 * 2**20
"""Logits held at a time: 16 MiB in float32."""


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        logps = [_log_softmax(hidden[part], weight).gather(1, targets[part, None])[:, 0] for part in _parts(len(targets), chunk)]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Hundreds of chunks add up here: never in half precision.
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part in _parts(len(targets), ctx.chunk):
            # d logp_target / d logits = onehot(target) - softmax
            grad_logits = _log_softmax(hidden[part], weight).exp_().mul_(-grad[part, None])
            grad_logits.scatter_add_(1, targets[part, None], grad[part, None].to(grad_logits.dtype))
            grad_logits = grad_logits.to(weight.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _parts(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.T
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


class LogpHead(nn.Module):
    """An output layer that answers with log-probs of given tokens instead of logits; shares the layer's weight [V, D]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [A, D], targets [A] -> log p of each target, [A], float32 (float64 for a float64 model), in nats."""
        chunk = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        return _ChunkedLogps.apply(hidden, self.weight, targets, chunk)


class PolicyLogps(nn.Module):
    """A causal language model as the function SPIN needs: a packed row -> log-probs of its answer tokens."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        lm.lm_head = LogpHead(lm.lm_head)
        self.lm = lm

    def forward(self, packed: Packed) -> torch.Tensor:
        """Returns [A] log-probs in nats; prompt positions never reach the output layer."""
        out = self.lm.base_model(
            input_ids=packed.input_ids[None], position_ids=packed.position_ids[None], packed=packed, use_cache=False
        )
        return self.lm.lm_head(out.last_hidden_state[0, packed.predictor], packed.targets)
