"""Packing changes nothing: packed == padded == one answer at a time, in loss-relevant log-probs and in every gradient."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.learner import attention, logps
from spin_ray.learner.logps import LogpHead, PolicyLogps
from spin_ray.learner.packing import num_common, pack, plan_micro_batches, row_tokens
from spin_ray.records import Pair


def tiny(*, tied: bool, implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3, attn_implementation=implementation,
    )
    return LlamaForCausalLM(config).to(torch.float64)


def pair(prompt: int, real: int, generated: int, seed: int = 0, *, alike: int = 0) -> Pair:
    """Lengths of the three, and how many tokens y' begins with as y does."""
    rng = np.random.default_rng([seed, prompt, real, generated])
    ids = [rng.integers(1, 50, length).astype(np.int32) for length in (prompt, real, generated)]
    ids[2][:alike] = ids[1][: min(alike, generated)]
    return Pair(0, 0, 0, 0, *ids, np.zeros(real, np.float32), np.zeros(generated, np.float32), "stop")


def plain_sums(model: LlamaForCausalLM, pairs: list[Pair]) -> torch.Tensor:
    """[N, 2] summed log-probs by transformers itself, one answer at a time, no packing, no chunking."""
    rows = []
    for one in pairs:
        for answer in (one.real_ids, one.generated_ids):
            ids = torch.tensor(np.concatenate([one.prompt_ids, answer])[None].astype(np.int64))
            logp = torch.log_softmax(model(ids).logits[0], -1)[len(one.prompt_ids) - 1 : -1]
            rows.append(logp.gather(1, torch.tensor(answer[:, None].astype(np.int64))).sum())
    return torch.stack(rows).view(len(pairs), 2)


def padded_sums(model: LlamaForCausalLM, pairs: list[Pair]) -> torch.Tensor:
    """[N, 2] summed log-probs by transformers on one right-padded batch."""
    answers = [(one.prompt_ids, answer) for one in pairs for answer in (one.real_ids, one.generated_ids)]
    rows = [torch.tensor(np.concatenate(parts).astype(np.int64)) for parts in answers]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logp = torch.log_softmax(model(ids, attention_mask=mask).logits, -1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    sums = [logp[k, len(prompt) - 1 : len(prompt) + len(answer) - 1].sum() for k, (prompt, answer) in enumerate(answers)]
    return torch.stack(sums).view(len(pairs), 2)


def packed_sums(policy: PolicyLogps, pairs: list[Pair], *, share_prompt: bool) -> torch.Tensor:
    packed = pack(pairs, share_prompt=share_prompt)
    out = policy(packed)
    return packed.sums(out)[:, :2].sum(-1)


def gradients(model: torch.nn.Module, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.nn.functional.softplus(-0.3 * (sums[:, 0] - sums[:, 1])).sum().backward()
    return {name.removeprefix("lm."): parameter.grad.clone() for name, parameter in model.named_parameters()}


ALIKE = [pair(2, 6, 6, alike=6), pair(2, 5, 8, alike=3), pair(3, 6, 4, alike=4), pair(3, 4, 6, alike=4), pair(4, 5, 5, alike=4)]
"""y' is y, they part in the middle, y' ends where y goes on, y ends where y' goes on, only the last token differs."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_packed_equals_padded_equals_one_at_a_time(tied, share_prompt, accumulate, monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 150)  # chunks of 3 tokens
    pairs = [pair(5, 4, 7), pair(1, 1, 1), pair(3, 9, 2), pair(8, 1, 6), *ALIKE]
    reference = tiny(tied=tied, implementation="sdpa")
    policy = PolicyLogps(tiny(tied=tied, implementation=attention.NAME), accumulate=accumulate)
    plain, padded, ours = plain_sums(reference, pairs), padded_sums(reference, pairs), packed_sums(policy, pairs, share_prompt=share_prompt)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, padded, rtol=1e-10, atol=1e-10)
    expected, found = gradients(reference, plain), gradients(policy, ours)
    assert expected.keys() == found.keys()
    for name in expected:
        # RMSNorm computes in float32: with a shared prompt the two answers' gradients are summed before it, not after.
        tolerance = 1e-5 if share_prompt else 1e-10
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_two_rows_in_one_backward_pass_and_padding_in_a_row(tied, accumulate):
    """The kept tensor of the weight's gradient serves one row at a time; a tied embedding leaves its padding row to the head."""
    def model(implementation):
        lm = tiny(tied=tied, implementation=implementation)
        lm.get_input_embeddings().padding_idx = 7
        return lm

    pairs = [pair(5, 4, 7), pair(3, 9, 2), pair(8, 1, 6)]
    pairs[1].prompt_ids[1] = 7
    reference, policy = model("sdpa"), PolicyLogps(model(attention.NAME), accumulate=accumulate)
    expected = gradients(reference, plain_sums(reference, pairs))
    found = gradients(policy, torch.cat([packed_sums(policy, [one], share_prompt=False) for one in pairs]))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10, msg=name)


def drawn(lengths: list[tuple[int, int, int, int]]) -> list[Pair]:
    return [pair(*sizes, seed=k, alike=min(alike, *sizes[1:])) for k, (*sizes, alike) in enumerate(lengths)]


LENGTHS = st.lists(st.tuples(*[st.integers(1, 9)] * 3, st.integers(0, 9)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.booleans())
def test_property_packed_equals_one_at_a_time(lengths, share_prompt):
    pairs = drawn(lengths)
    with torch.no_grad():
        plain = plain_sums(tiny(tied=True, implementation="sdpa"), pairs)
        ours = packed_sums(PolicyLogps(tiny(tied=True, implementation=attention.NAME)), pairs, share_prompt=share_prompt)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def test_order_of_pairs_does_not_matter():
    pairs = [pair(5, 4, 7), pair(2, 3, 1), pair(3, 9, 2)]
    policy = PolicyLogps(tiny(tied=True, implementation=attention.NAME))
    torch.testing.assert_close(packed_sums(policy, pairs[::-1], share_prompt=True), packed_sums(policy, pairs, share_prompt=True).flip(0))


def test_pair_without_generated_answer_has_only_its_real_branch():
    packed = pack([pair(4, 3, 0)], share_prompt=True)
    assert packed.answer_of.tolist() == [0, 0, 0]
    assert not packed.trees[0].forks


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_third_answer_is_packed_as_the_others_and_parts_add_up(share_prompt):
    anchors = [pair(5, 4, 7), pair(1, 1, 1), *ALIKE]
    three = [replace(one, anchor_ids=np.concatenate([one.real_ids[: k % 3], np.arange(1, 4 + k, dtype=np.int32)])) for k, one in enumerate(anchors)]
    model, policy = tiny(tied=True, implementation="sdpa"), PolicyLogps(tiny(tied=True, implementation=attention.NAME))
    packed = pack(three, share_prompt=share_prompt)
    sums = packed.sums(policy(packed))
    as_generated = [replace(one, generated_ids=one.anchor_ids) for one in three]
    expected = torch.cat([plain_sums(model, three), plain_sums(model, as_generated)[:, 1:]], 1)
    torch.testing.assert_close(sums.sum(-1), expected)
    lone = pack(three[:1], share_prompt=share_prompt)  # 4, 7 and 3 tokens: the border is behind the fourth
    logps, answer_of = policy(lone), lone.answer_of
    for answer, length in enumerate((4, 7, 3)):
        torch.testing.assert_close(sums[0, answer, 0], logps[answer_of == answer][: min(length, 4)].sum())
        torch.testing.assert_close(sums[0, answer, 1], logps[answer_of == answer][4:].sum())
    for one in three:
        assert row_tokens(one, share_prompt=share_prompt) == len(pack([one], share_prompt=share_prompt).input_ids)


def test_what_both_answers_begin_with_is_laid_out_once():
    assert [num_common(one) for one in ALIKE] == [5, 3, 3, 3, 4]
    packed = pack(ALIKE[:2], share_prompt=True)
    assert not packed.trees[0].forks and packed.trees[0].length == 2 + 5  # y' is y: a trunk without branches
    assert packed.trees[1].length == 2 + 3 + 1 + 4


def test_where_the_answers_are_the_same_the_margin_has_no_gradient():
    policy = PolicyLogps(tiny(tied=True, implementation=attention.NAME))
    real, generated = packed_sums(policy, ALIKE[:1], share_prompt=True)[0]
    assert real == generated
    for name, gradient in gradients(policy, packed_sums(policy, ALIKE[:1], share_prompt=True)).items():
        assert gradient.abs().max() < 1e-15, name


def test_end_token_is_trained_on_exactly_once_per_answer():
    one = pair(4, 3, 5)
    packed = pack([one], share_prompt=True)
    assert packed.targets.tolist() == [*one.real_ids, *one.generated_ids]
    assert packed.predictor.tolist()[:1] == [3] and packed.predictor.tolist()[3] == 3  # both answers start from the last prompt token


@pytest.mark.parametrize("share_prompt", [True, False])
def test_row_tokens_is_what_pack_lays_out(share_prompt):
    for one in (pair(4, 3, 5), pair(4, 3, 0), pair(1, 1, 1), *ALIKE):
        assert row_tokens(one, share_prompt=share_prompt) == len(pack([one], share_prompt=share_prompt).input_ids)


def test_head_matches_log_softmax_and_its_gradient(monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 20 * 3)
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 20, bias=False, dtype=torch.float64)
    hidden, targets = torch.randn(11, 6, dtype=torch.float64, requires_grad=True), torch.randint(20, (11,))

    def head(hidden, weight):
        return logps._ChunkedLogps.apply(hidden, weight, targets, logps._Scratch(), 3, True, False, None)

    assert torch.autograd.gradcheck(head, (hidden, linear.weight))
    full = torch.log_softmax(linear(hidden), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(LogpHead(linear)(hidden, targets), full)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 60))
def test_plan_takes_every_pair_once_and_agrees_on_the_number(lengths, num_ranks, pack_tokens):
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, pack_tokens=pack_tokens)
    assert len(plan) == num_ranks and len({len(rank) for rank in plan}) == 1
    assert Counter(i for rank in plan for micro in rank for i in micro) == Counter(range(len(lengths)))
    for micro in (micro for rank in plan for micro in rank):
        assert len(micro) <= 1 or sum(lengths[i] for i in micro) <= pack_tokens
    loads = [sum(lengths[i] for micro in rank for i in micro) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths)


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"pair 1 .* empty prompt"):
        pack([pair(2, 3, 4), pair(0, 3, 4)], share_prompt=True)


@settings(deadline=None, max_examples=15)
@given(LENGTHS, st.integers(1, 40))
def test_property_accumulation_over_micro_batches_equals_one_batch(lengths, pack_tokens):
    """Loss and every gradient, chunks that the backward pass computes again among them."""
    pairs = drawn(lengths)
    policy = PolicyLogps(tiny(tied=True, implementation=attention.NAME), chunk_elements=150)
    expected = gradients(policy, packed_sums(policy, pairs, share_prompt=False))
    [plan] = plan_micro_batches([row_tokens(one, share_prompt=False) for one in pairs], num_ranks=1, pack_tokens=pack_tokens)
    parts = [gradients(policy, packed_sums(policy, [pairs[i] for i in micro], share_prompt=False)) for micro in plan]
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(part[name] for part in parts), gradient, rtol=1e-6, atol=1e-6, msg=name)


def test_activation_checkpointing_changes_no_gradient():
    pairs = [pair(5, 4, 7), pair(1, 1, 1), pair(3, 9, 2)]
    plain, checkpointed = (PolicyLogps(tiny(tied=True, implementation=attention.NAME)) for _ in range(2))
    checkpointed.lm.gradient_checkpointing_enable()
    checkpointed.train()
    expected = gradients(plain, packed_sums(plain, pairs, share_prompt=True))
    found = gradients(checkpointed, packed_sums(checkpointed, pairs, share_prompt=True))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def test_rows_computed_again_in_one_backward_pass_keep_their_own_masks():
    """Two rows of the same length: activation checkpointing computes the first one again after the second one's forward pass."""
    rows = [[pair(5, 4, 7), pair(3, 3, 3)], [pair(3, 3, 3), pair(5, 4, 7)]]
    plain, checkpointed = (PolicyLogps(tiny(tied=True, implementation=attention.NAME)) for _ in range(2))
    checkpointed.lm.gradient_checkpointing_enable()
    checkpointed.train()
    found, expected = [
        gradients(policy, torch.cat([packed_sums(policy, row, share_prompt=True) for row in rows])) for policy in (checkpointed, plain)
    ]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_survives_a_softmax_that_underflows(dtype):
    linear = torch.nn.Linear(2, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[200.0, 0.0], [0.0, 0.0], [-200.0, 0.0]]))
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=dtype)
    found = LogpHead(linear)(hidden, torch.tensor([1, 1]))
    assert found.dtype == torch.float32 and found.tolist() == [-200.0, -200.0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [logps.PRODUCT, logps.Shape(0.4), logps.Shape(1.0, 1.5), logps.Shape(2.0, 0.7)])
def test_head_with_bias_scale_and_cap(shape, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 20, bias=bias, dtype=torch.float64)
    hidden, targets = torch.randn(11, 6, dtype=torch.float64, requires_grad=True), torch.randint(20, (11,))
    inputs = (hidden, linear.weight, *([linear.bias] if bias else []))

    def head(hidden, weight, bias=None):
        return logps._ChunkedLogps.apply(hidden, weight, targets, logps._Scratch(), 3, True, False, None, bias, shape)

    def full():
        logits = linear(hidden) * shape.scale
        return torch.log_softmax(torch.tanh(logits / shape.cap) * shape.cap if shape.cap else logits, -1).gather(1, targets[:, None])[:, 0]

    assert torch.autograd.gradcheck(head, inputs)
    torch.testing.assert_close(LogpHead(linear, shape=shape)(hidden, targets), full())
    weights = torch.linspace(-1, 1, 11, dtype=torch.float64)
    for accumulate in (True, False):
        linear.zero_grad()
        (LogpHead(linear, shape=shape, chunk_elements=60, accumulate=accumulate)(hidden, targets) * weights).sum().backward()
        found = [p.grad.clone() for p in linear.parameters()]
        linear.zero_grad()
        (full() * weights).sum().backward()
        torch.testing.assert_close(found, [p.grad for p in linear.parameters()])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_without_targets_the_wrapped_model_is_plain_transformers(tied, accumulate):
    reference, policy = tiny(tied=tied, implementation="eager"), PolicyLogps(tiny(tied=tied, implementation="eager"), accumulate=accumulate)
    ids = torch.tensor([[3, 7, 9, 3, 20]])
    for _ in range(2):  # the second gradient adds to the first
        reference(ids).logits.cos().sum().backward()
        policy.lm(ids).logits.cos().sum().backward()
    torch.testing.assert_close(policy.lm(ids).logits, reference(ids).logits)
    expected = dict(reference.named_parameters())
    for name, parameter in policy.lm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-6, atol=1e-6, msg=name)


def test_two_passes_at_once_do_not_share_a_buffer():
    """A pass that waits for its backward keeps its buffer; a second backward through the same pass computes it again."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 20, bias=False, dtype=torch.float64)
    head, hidden, targets = LogpHead(linear), torch.randn(11, 6, dtype=torch.float64), torch.randint(20, (11,))
    first, second = head(hidden, targets), head(hidden + 1, targets)
    with torch.no_grad():
        head(hidden + 2, targets)
    pair_of_passes = torch.autograd.grad(first.sum() + second.sum(), linear.weight, retain_graph=True)[0]
    again = torch.autograd.grad(first.sum() + second.sum(), linear.weight)[0]
    full = sum(torch.log_softmax(linear(h), -1).gather(1, targets[:, None]).sum() for h in (hidden, hidden + 1))
    torch.testing.assert_close(pair_of_passes, torch.autograd.grad(full, linear.weight)[0])
    torch.testing.assert_close(again, pair_of_passes)
