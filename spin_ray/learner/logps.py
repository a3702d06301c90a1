"""Log-probs of answer tokens without ever holding [tokens, vocabulary] of a whole batch.

The output layer runs over chunks of the answer tokens only. d logp / d logits is softmax - onehot(target) times one
number per token, so the forward pass already multiplies it with the weight (the gradient of `hidden` but for that
number) and the backward pass only scales rows of [A, D]: nothing but the softmax itself touches every logit. A chunk's
logits become its softmax in place, in one buffer that lives as long as the head; the chunk that it holds when the
backward pass begins, the last one, is not computed again. With no more answer tokens than one chunk has, nothing is.

The gradient of the weight [V, D] is as large as any tensor here, so there is one of it, kept from pass to pass: where
input embedding and output layer are tied, the embedding's backward pass adds its few rows to what the head's left there.
With `accumulate` it is `weight.grad` itself; autograd, which would add a second tensor to that in every pass, is given none.

Some families change what the layer gives: z = cap(scale (hidden W^T + bias)), cap(u) = c tanh(u / c) (`Shape`). The scale goes into
the same number per token, the cap's slope 1 - (z / c)^2 is multiplied onto the softmax, in a second buffer that only such models have.

Memory: one chunk of logits and one [V, D], whatever the batch. Shapes: A answer tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from spin_ray.families import final_scale_and_cap, layers_with_attention
from spin_ray.learner.attention import CurrentRow
from spin_ray.learner.packing import Packed

CHUNK_ELEMENTS = 12 * 2**20
"""Logits held at a time: 48 MiB in float32."""
SMALLEST = 1e-30
"""A softmax below this is near underflow (float32 ends at 1e-38): its logarithm is computed from the logits instead."""


class Shape(NamedTuple):
    """What a family does to the product of its output layer: logits = cap tanh(scale (hidden W^T + bias) / cap)."""

    scale: float = 1.0
    cap: float | None = None


PRODUCT = Shape()
"""Nothing."""


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scratch: _Scratch, chunk: int, train: bool,
        accumulate: bool, embedding_grad: list[torch.Tensor] | None, bias: torch.Tensor | None = None, shape: Shape = PRODUCT,
    ) -> torch.Tensor:
        buffer = scratch.take_logits(min(chunk, len(targets)), weight)
        logps = hidden.new_empty(len(targets), dtype=buffer.dtype)
        unit_grads = torch.empty_like(hidden) if train else None
        softmax = None
        for part in _parts(len(targets), chunk):
            softmax = _softmax_less_onehot(hidden[part], weight, bias, shape, targets[part], buffer, logps[part])
            if train:
                torch.mm(softmax, weight, out=unit_grads[part])
        if train:
            ctx.save_for_backward(hidden, weight, bias, targets, unit_grads)
            ctx.shape = shape
            ctx.scratch, ctx.chunk, ctx.accumulate, ctx.embedding_grad = scratch, chunk, accumulate, embedding_grad
            ctx.held = (buffer, softmax)  # for one backward pass: it writes over it
        else:
            scratch.give_back(buffer)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, unit_grads = ctx.saved_tensors
        buffer, softmax = ctx.held or (ctx.scratch.take_logits(min(ctx.chunk, len(targets)), weight), None)
        ctx.held = None
        scale = -grad[:, None] if ctx.shape.scale == 1.0 else grad[:, None] * -ctx.shape.scale
        scaled = (hidden * scale).to(weight.dtype)
        grad_weight = None
        grad_bias = None if bias is None else scale.new_zeros(len(bias))
        if ctx.needs_input_grad[1] or grad_bias is not None:
            empty = weight.grad is None or not ctx.accumulate
            total = ctx.scratch.weight_grad(weight) if empty else weight.grad
            for part in reversed(_parts(len(targets), ctx.chunk)):
                if softmax is None:
                    softmax = _softmax_less_onehot(hidden[part], weight, bias, ctx.shape, targets[part], buffer)
                if grad_bias is not None:
                    grad_bias.addmv_(softmax.T.to(scale.dtype), scale[part, 0])
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
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return (unit_grads * scale).to(hidden.dtype), grad_weight, None, None, None, None, None, None, grad_bias, None


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
        ctx.padding_idx, ctx.accumulate, ctx.head_grad = padding_idx, accumulate, head_grad
        ctx.dtype, ctx.shape = weight.dtype, weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,), plain = ctx.saved_tensors, not ctx.head_grad  # the output layer was called for logits: autograd adds its gradient
        total = grad.new_zeros(ctx.shape) if plain else ctx.head_grad.pop()
        if ctx.padding_idx is not None:  # which nn.Embedding does not train
            grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0.0)
        total.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(total.dtype))
        return total.to(ctx.dtype) if plain or not ctx.accumulate else None, None, None, None, None


def _softmax_less_onehot(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: Shape, targets: torch.Tensor, buffer: torch.Tensor,
    logps: torch.Tensor | None = None,
) -> torch.Tensor:
    """[C, V] in the weight's dtype, a view of `buffer` where that has it; writes log p of the targets to `logps` [C].

    With a cap it is times the cap's slope: minus d log p / d (the logits before the cap), whatever the family.
    """
    logits = buffer[: len(targets)]
    if weight.dtype == buffer.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    slope = _shape(logits, bias, shape)
    torch.softmax(logits, dim=1, out=logits)
    if logps is not None:
        at_target = logits.gather(1, targets[:, None])[:, 0]
        torch.log(at_target, out=logps)
        rare = (at_target < SMALLEST).nonzero()[:, 0]
        if len(rare):
            again = (hidden[rare] @ weight.T).to(logps.dtype)
            _shape(again, bias, shape)
            logps[rare] = torch.log_softmax(again, dim=1).gather(1, targets[rare, None])[:, 0]
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    if slope is not None:
        logits.mul_(slope)
    return logits.to(weight.dtype)


def _shape(logits: torch.Tensor, bias: torch.Tensor | None, shape: Shape) -> torch.Tensor | None:
    """Bias, scale and cap, in place; returns the slope of the cap at every logit, None where there is no cap."""
    if bias is not None:
        logits.add_(bias)
    if shape.scale != 1.0:
        logits.mul_(shape.scale)
    if shape.cap is None:
        return None
    logits.div_(shape.cap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(shape.cap)
    return slope


def _parts(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


class LogpHead(nn.Module):
    """An output layer that answers with log-probs of given tokens instead of logits; shares the layer's weight [V, D] and bias [V].

    Called without targets it is the plain layer, so that the model around it still works as transformers means it.
    """

    def __init__(self, linear: nn.Linear, *, shape: Shape = PRODUCT, chunk_elements: int | None = None, accumulate: bool = False):
        super().__init__()
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.shape = shape
        self.accumulate = accumulate
        self._chunk_elements = chunk_elements or CHUNK_ELEMENTS
        self._scratch = _Scratch()
        self.embedding_grad: list[torch.Tensor] | None = None
        """Where the gradient of a tied weight goes on to: the embedding's forward pass, which comes first, sets it."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [A, D], targets [A] -> log p of each target, [A], float32 (float64 for a float64 model), in nats.

        Without targets: hidden [..., D] -> the layer's product [..., V], before the family's scale and cap.
        """
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        chunk = max(1, self._chunk_elements // self.weight.shape[0])
        return _ChunkedLogps.apply(
            hidden, self.weight, targets, self._scratch, chunk, torch.is_grad_enabled(), self.accumulate, self.embedding_grad,
            self.bias, self.shape,
        )


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


def body(lm: nn.Module) -> nn.Module:
    """The model below its output layer; of a composite one, the language model in it."""
    decoder = lm.get_decoder()
    return lm.base_model if decoder in (lm, lm.get_output_embeddings()) else decoder


class PolicyLogps(nn.Module):
    """A causal language model as the function SPIN needs: a packed row -> log-probs of its answer tokens.

    `lm` must have been loaded with the attention of attention.py. It goes on working as plain transformers: `lm(input_ids)`
    gives logits, with any other attention that is set.
    `accumulate`: the output layer's gradient goes into `weight.grad` past autograd: only for float32 and float64, and only
    where nothing waits for autograd to announce it, as ZeRO does.
    """

    def __init__(self, lm: nn.Module, *, chunk_elements: int | None = None, accumulate: bool = False):
        super().__init__()
        head = LogpHead(
            lm.get_output_embeddings(), shape=Shape(*final_scale_and_cap(lm.config)), chunk_elements=chunk_elements, accumulate=accumulate
        )
        lm.set_output_embeddings(head)
        embedding = lm.get_input_embeddings()
        if embedding.weight is head.weight and type(embedding) is nn.Embedding:  # a subclass may scale what it looks up
            lm.set_input_embeddings(TiedEmbedding(embedding, head))
        trained = {id(parameter) for part in (body(lm), head) for parameter in part.parameters()}
        for parameter in lm.parameters():  # what sees pictures, in a composite model, stays as it is
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
        self.lm = lm
        self._row, self._num_layers = CurrentRow(lm), layers_with_attention(lm.config)

    @property
    def head(self) -> LogpHead:
        return self.lm.get_output_embeddings()

    def forward(self, packed: Packed) -> torch.Tensor:
        """Returns [A] log-probs in nats; prompt positions never reach the output layer.

        Raises BadInput where a layer's attention is not the one of attention.py, or asks it for what it does not know.
        """
        self._row.begin(packed)
        out = body(self.lm)(input_ids=packed.input_ids[None], position_ids=packed.position_ids[None], use_cache=False)
        self._row.check_layers(self._num_layers)
        logps = self.head(out.last_hidden_state[0, packed.predictor], packed.targets)
        if logps.requires_grad:  # the backward pass may compute layers again, after another row's forward pass
            logps.register_hook(lambda _: setattr(self._row, "packed", packed))
        return logps
