"""Log-probs of answer tokens without ever holding [tokens, vocabulary] of a whole batch.

The output layer runs over chunks of the answer tokens only. d logp / d logits is softmax - onehot(target) times one
number per token, so the forward pass already multiplies it with the weight (the gradient of `hidden` but for that
number) and the backward pass only scales rows of [A, D]: nothing but the softmax itself touches every logit. A chunk's
logits become its softmax in place, in one buffer that lives as long as the head; the chunk that it holds when the
backward pass begins, the last one, is not computed again. With no more answer tokens than one chunk has, nothing is.

The gradient of the weight [V, D] is as large as any tensor here, so there is one of it, kept from pass to pass: where
input embedding and output layer are tied, the embedding's backward pass adds its few rows to what the head's left there.
With `accumulate` it is `weight.grad` itself; autograd, which would add a second tensor to that in every pass, is given none.

Memory: one chunk of logits and one [V, D], whatever the batch. Shapes: A answer tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spin_ray.learner.packing import Packed

CHUNK_ELEMENTS = 12 * 2**20
"""Logits held at a time: 48 MiB in float32."""
SMALLEST = 1e-30
"""A softmax below this is near underflow (float32 ends at 1e-38): its logarithm is computed from the logits instead."""


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scratch: _Scratch, chunk: int, train: bool,
        accumulate: bool, embedding_grad: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        buffer = scratch.take_logits(min(chunk, len(targets)), weight)
        logps = hidden.new_empty(len(targets), dtype=buffer.dtype)
        unit_grads = torch.empty_like(hidden) if train else None
        softmax = None
        for part in _parts(len(targets), chunk):
            softmax = _softmax_less_onehot(hidden[part], weight, targets[part], buffer, logps[part])
            if train:
                torch.mm(softmax, weight, out=unit_grads[part])
        if train:
            ctx.save_for_backward(hidden, weight, targets, unit_grads)
            ctx.scratch, ctx.chunk, ctx.accumulate, ctx.embedding_grad = scratch, chunk, accumulate, embedding_grad
            ctx.held = (buffer, softmax)  # for one backward pass: it writes over it
        else:
            scratch.give_back(buffer)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, unit_grads = ctx.saved_tensors
        buffer, softmax = ctx.held or (ctx.scratch.take_logits(min(ctx.chunk, len(targets)), weight), None)
        ctx.held = None
        scale = -grad[:, None]
        scaled = (hidden * scale).to(weight.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            empty = weight.grad is None or not ctx.accumulate
            total = ctx.scratch.weight_grad(weight) if empty else weight.grad
            for part in reversed(_parts(len(targets), ctx.chunk)):
                if softmax is None:
                    softmax = _softmax_less_onehot(hidden[part], weight, targets[part], buffer)
                if weight.dtype == total.dtype:
                    total.addmm_(softmax.T, scaled[part], beta=0.0 if empty else 1.0)
                else:  # many chunks add up here: never in half precision
                    product = softmax.T @ scaled[part]
                    total.copy_(product) if empty else total.add_(product)
                softmax, empty = None, False
            if ctx.accumulate:
                weight.grad = total
            elif ctx.embedding_grad is None:
                grad_weight = total.to(weight.dtype)
            if ctx.embedding_grad is not None:
                ctx.embedding_grad.append(total)  # the embedding's backward pass comes later, and adds its rows
        ctx.scratch.give_back(buffer)
        return (unit_grads * scale).to(hidden.dtype), grad_weight, None, None, None, None, None, None


class _Scratch:
    """The largest tensors of a pass, kept for the next one: a fresh one costs more in page faults than a softmax in it."""

    def __init__(self) -> None:
        self._logits: list[torch.Tensor] = []
        self._weight_grad: torch.Tensor | None = None

    def take_logits(self, rows: int, weight: torch.Tensor) -> torch.Tensor:
        """A tensor [>= rows, V] that no other pass is using, until it is given back."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        while self._logits:
            buffer = self._logits.pop()
            if len(buffer) >= rows and buffer.dtype == dtype:
                return buffer
        return torch.empty(rows, weight.shape[0], dtype=dtype, device=weight.device)

    def give_back(self, logits: torch.Tensor) -> None:
        self._logits.append(logits)

    def weight_grad(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor like the weight, at least float32: the kept one, unless autograd still holds that for another pass."""
        dtype, kept = torch.promote_types(weight.dtype, torch.float32), self._weight_grad
        if kept is None or (kept.shape, kept.dtype) != (weight.shape, dtype) or kept._use_count() > 1:
            self._weight_grad = kept = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        return kept


class _Lookup(torch.autograd.Function):
    """Rows of a tied embedding. The output layer's backward pass, which comes first, leaves the weight's gradient in `head_grad`."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, accumulate: bool, head_grad: list[torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.accumulate, ctx.head_grad, ctx.dtype = padding_idx, accumulate, head_grad, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,), total = ctx.saved_tensors, ctx.head_grad.pop()
        if ctx.padding_idx is not None:  # which nn.Embedding does not train
            grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0.0)
        total.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(total.dtype))
        return None if ctx.accumulate else total.to(ctx.dtype), None, None, None, None


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

    def __init__(self, linear: nn.Linear, *, chunk_elements: int | None = None, accumulate: bool = False):
        super().__init__()
        self.weight = linear.weight
        self.accumulate = accumulate
        self._chunk_elements = chunk_elements or CHUNK_ELEMENTS
        self._scratch = _Scratch()
        self.embedding_grad: list[torch.Tensor] | None = None
        """Where the gradient of a tied weight goes on to: the embedding's forward pass, which comes first, sets it."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [A, D], targets [A] -> log p of each target, [A], float32 (float64 for a float64 model), in nats."""
        chunk = max(1, self._chunk_elements // self.weight.shape[0])
        train = torch.is_grad_enabled()
        return _ChunkedLogps.apply(hidden, self.weight, targets, self._scratch, chunk, train, self.accumulate, self.embedding_grad)


class TiedEmbedding(nn.Module):
    """An input embedding whose weight is the output layer's too: one gradient for both."""

    def __init__(self, embedding: nn.Embedding, head: LogpHead):
        super().__init__()
        self.weight = embedding.weight
        self._padding_idx = embedding.padding_idx
        self._head = [head]  # not a submodule of this one

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> rows of the weight, [..., D]."""
        self._head[0].embedding_grad = head_grad = []
        return _Lookup.apply(self.weight, ids, self._padding_idx, self._head[0].accumulate, head_grad)


class PolicyLogps(nn.Module):
    """A causal language model as the function SPIN needs: a packed row -> log-probs of its answer tokens.

    `accumulate`: the output layer's gradient goes into `weight.grad` past autograd: only for float32 and float64, and only
    where nothing waits for autograd to announce it, as ZeRO does.
    """

    def __init__(self, lm: nn.Module, *, chunk_elements: int | None = None, accumulate: bool = False):
        super().__init__()
        lm.lm_head = LogpHead(lm.lm_head, chunk_elements=chunk_elements, accumulate=accumulate)
        embedding = lm.get_input_embeddings()
        if embedding.weight is lm.lm_head.weight and type(embedding) is nn.Embedding:  # a subclass may scale what it looks up
            lm.set_input_embeddings(TiedEmbedding(embedding, lm.lm_head))
        self.lm = lm

    def forward(self, packed: Packed) -> torch.Tensor:
        """Returns [A] log-probs in nats; prompt positions never reach the output layer."""
        out = self.lm.base_model(
            input_ids=packed.input_ids[None], position_ids=packed.position_ids[None], packed=packed, use_cache=False
        )
        return self.lm.lm_head(out.last_hidden_state[0, packed.predictor], packed.targets)
