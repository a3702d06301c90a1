"""Packed attention against a mask over the whole row, made token by token; and what it refuses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from spin_ray.bench.random_models import PAIRS, pair, tiny_config, tiny_model
from spin_ray.errors import BadInput
from spin_ray.learner import attention
from spin_ray.learner.attention import CurrentRow, packed_attention
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.packing import Packed, pack


def paths(packed: Packed, share_prompt: bool) -> list[set[int]]:
    """For every token of the row the tokens that come before it in its answer, and itself: from positions alone, trees left aside."""
    seen = []
    for tree in packed.trees:
        positions = packed.position_ids[tree.start : tree.start + tree.length].tolist()
        trunk = next((k for k in range(1, tree.length) if positions[k] != positions[k - 1] + 1), None)  # where the second branch begins
        fork = positions[trunk] if trunk is not None else tree.length
        for k in range(tree.length):
            own = range(fork) if k >= (trunk or tree.length) else range(0)
            start = trunk if trunk is not None and k >= trunk else 0
            seen.append({tree.start + j for j in (*own, *range(start, k + 1))})
    return seen


def expected(query, key, value, packed, share_prompt, *, scale, window=None, cap=None, sinks=None):
    """By hand: one softmax per token and head."""
    out = torch.zeros(1, query.shape[2], query.shape[1], value.shape[3], dtype=value.dtype)
    groups = query.shape[1] // key.shape[1]
    for token, path in enumerate(paths(packed, share_prompt)):
        own = packed.position_ids[token]
        keys = sorted(k for k in path if window is None or own - packed.position_ids[k] < window)
        for head in range(query.shape[1]):
            scores = key[0, head // groups, keys] @ query[0, head, token] * scale
            scores = cap * torch.tanh(scores / cap) if cap else scores
            scores = torch.cat([scores, sinks[head : head + 1]]) if sinks is not None else scores
            out[0, token, head] = torch.softmax(scores, 0)[: len(keys)] @ value[0, head // groups, keys]
    return out


def module(packed: Packed) -> nn.Module:
    layer = nn.Module()
    row = CurrentRow(layer)
    row.begin(packed)
    return layer


def tensors(length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, size, dtype=torch.float64) for heads, size in ((4, 6), (2, 6), (2, 3))]


CASES = {"plain": {}, "window": {"window": 4}, "cap": {"cap": 0.7}, "sinks": {"sinks": True}, "all": {"window": 3, "cap": 0.7, "sinks": True}}


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_token_sees_its_own_answer_and_no_more(case, share_prompt):
    packed, options = pack(PAIRS, share_prompt=share_prompt), dict(CASES[case])
    query, key, value = tensors(len(packed.input_ids))
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64) if options.pop("sinks", False) else None
    found, _ = packed_attention(
        module(packed), query, key, value, None, scaling=0.5, sliding_window=options.get("window"), softcap=options.get("cap"), s_aux=sinks
    )
    torch.testing.assert_close(found, expected(query, key, value, packed, share_prompt, scale=0.5, sinks=sinks, **options))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3, st.integers(0, 9)), min_size=1, max_size=4), st.integers(1, 20), st.booleans())
def test_property_a_window_counts_positions(lengths, window, share_prompt):
    packed = pack([pair(*sizes, alike=min(alike, *sizes[1:])) for *sizes, alike in lengths], share_prompt=share_prompt)
    query, key, value = tensors(len(packed.input_ids))
    found, _ = packed_attention(module(packed), query, key, value, None, scaling=0.5, sliding_window=window)
    torch.testing.assert_close(found, expected(query, key, value, packed, share_prompt, scale=0.5, window=window))


def test_masks_are_made_once_per_row_and_window():
    row = CurrentRow(nn.Module())
    row.begin(pack(PAIRS, share_prompt=True))
    assert row.masks(4) is row.masks(4) and row.masks(4) is not row.masks(None)
    assert torch.equal(row.masks(1000)[0], row.masks(None)[0])  # no tree is that deep
    first = row.masks(4)
    row.begin(pack(PAIRS, share_prompt=False))
    assert row.masks(4) is not first


@pytest.mark.parametrize(("arguments", "named"), [
    ({"position_bias": torch.zeros(1)}, "position_bias"), ({"is_causal": False}, "is_causal"), ({"dropout": 0.1}, "dropout"),
    ({"chunk": 3, "head_mask": torch.ones(4)}, "chunk, head_mask"), ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "attention_mask"),
])
def test_what_it_does_not_know_is_refused_by_name(arguments, named):
    packed = pack(PAIRS[:1], share_prompt=True)
    mask = arguments.pop("attention_mask", None)
    with pytest.raises(BadInput, match=f"does not know its {named};"):
        packed_attention(module(packed), *tensors(len(packed.input_ids)), mask, scaling=0.5, **arguments)


def test_neutral_arguments_are_not_refused():
    packed = pack(PAIRS[:1], share_prompt=True)
    packed_attention(
        module(packed), *tensors(len(packed.input_ids)), None, scaling=0.5, position_ids=packed.position_ids, head_mask=None, is_causal=True,
        use_cache=False, dropout=0.0,
    )


def test_a_layer_that_goes_another_way_is_named():
    model = nn.ModuleList([nn.Module(), nn.Module()])
    packed = pack(PAIRS[:1], share_prompt=True)
    row = CurrentRow(model)
    row.begin(packed)
    model[0].layer_idx = 0
    packed_attention(model[0], *tensors(len(packed.input_ids)), None)
    with pytest.raises(BadInput, match="the attention of layer 1 does not go through transformers' interface"):
        row.check_layers(2)
    row.check_layers(1)


def test_other_keys_than_the_row_are_refused():
    packed = pack(PAIRS[:1], share_prompt=True)
    query, key, value = tensors(len(packed.input_ids))
    with pytest.raises(BadInput, match="attends to 4 tokens"):
        packed_attention(module(packed), query, key[:, :, :4], value[:, :, :4], None)


def varlen_by_hand(query, key, value, own, seen, scale, window):
    """What the kernel computes, a sequence at a time: causal, in line at the ends."""
    outputs = []
    for begin, end, first, last in zip(own.starts, own.starts[1:], seen.starts, seen.starts[1:], strict=False):
        q, k, v = query[begin:end], key[first:last], value[first:last]
        places = torch.arange(len(k))
        ends = torch.arange(len(q))[:, None] + len(k) - len(q)
        mask = (places <= ends) & (places > ends - (window or len(k)))
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def kernel(monkeypatch):
    """The rows take the way that they take on a GPU, but for the kernel itself."""
    monkeypatch.setattr(attention, "_has_kernel", lambda query, value: True)
    monkeypatch.setattr(attention, "_varlen", varlen_by_hand)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3, st.integers(0, 9)), min_size=1, max_size=5), st.sampled_from([None, 1, 3, 20]), st.booleans())
def test_property_two_calls_compute_what_a_mask_does(kernel, lengths, window, share_prompt):
    packed = pack([pair(*sizes, alike=min(alike, *sizes[1:])) for *sizes, alike in lengths], share_prompt=share_prompt)
    query, key, value = tensors(len(packed.input_ids))
    found, _ = packed_attention(module(packed), query, key, value, None, scaling=0.5, sliding_window=window)
    torch.testing.assert_close(found, expected(query, key, value, packed, share_prompt, scale=0.5, window=window))


def test_two_calls_give_a_model_the_same_losses_and_gradients(kernel, monkeypatch):
    def sums_and_gradients(share_prompt):
        lm = tiny_model(tiny_config("mistral")).to(torch.float64)
        lm.set_attn_implementation(attention.NAME)
        policy = PolicyLogps(lm.eval())
        sums = pack(PAIRS, share_prompt=share_prompt)
        sums = sums.sums(policy(sums))
        sums.sin().sum().backward()
        return sums.detach(), {name: parameter.grad for name, parameter in policy.named_parameters()}

    shared, its_gradients = sums_and_gradients(True)
    alone, gradients = sums_and_gradients(False)
    monkeypatch.undo()
    usual, usual_gradients = sums_and_gradients(True)
    for sums, found in ((alone, gradients), (usual, usual_gradients)):
        torch.testing.assert_close(shared, sums, rtol=1e-5, atol=1e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(its_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("window", [None, 4, 1000])
def test_variable_length_kernel_has_the_same_window(window, share_prompt):
    packed = pack(PAIRS, share_prompt=share_prompt).to(torch.device("cuda"))
    query, key, value = (torch.randn(1, heads, len(packed.input_ids), 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    found, _ = packed_attention(module(packed), query, key, value, None, scaling=0.1, sliding_window=window)
    exact, _ = packed_attention(module(packed), query.float(), key.float(), value.float(), None, scaling=0.1, sliding_window=window)
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)
