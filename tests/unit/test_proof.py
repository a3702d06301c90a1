"""The comparison of packed and plain: it finds what it is for, and leaves nothing behind."""

import pytest
import torch

from spin_ray.bench.random_models import PAIRS, tiny_config, tiny_model
from spin_ray.errors import BadInput
from spin_ray.learner import attention, logps, proof
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.modes import checkpoint_activations, quieten


def policy(family: str = "llama", **options) -> PolicyLogps:
    lm = tiny_model(tiny_config(family))
    lm.set_attn_implementation(attention.NAME)
    lm.gradient_checkpointing_enable()
    return PolicyLogps(lm, **options)


def test_it_leaves_no_trace():
    subject = policy(accumulate=True)
    quieten(subject)
    checkpoint_activations(subject.lm, True)
    modes = [module.training for module in subject.modules()]
    facts = proof.compare(subject, PAIRS, share_prompt=True)
    assert facts.within(proof.EXACT) and facts.num_tokens == sum(len(p.real_ids) + len(p.generated_ids) for p in PAIRS)
    assert modes == [module.training for module in subject.modules()] and True in modes and False in modes
    assert subject.head.accumulate and subject.lm.config._attn_implementation == attention.NAME
    assert all(parameter.grad is None for parameter in subject.parameters())


def test_without_parameters_no_gradient_is_computed():
    subject = policy()
    quieten(subject)
    facts = proof.compare(subject, PAIRS, share_prompt=True, num_parameters=0)
    assert facts.within(proof.EXACT) and (facts.gradient, facts.parameter) == (0.0, "")


def see_everything(row, window):
    return [torch.ones(tree.length, tree.length, dtype=torch.bool) for tree in row.packed.trees]


def test_answers_that_see_each_other_are_found_in_every_dtype(monkeypatch):
    subject = policy()
    quieten(subject)
    honest = proof.compare(subject, PAIRS, share_prompt=True)
    monkeypatch.setattr(attention.CurrentRow, "masks", see_everything)
    leaking = proof.compare(subject, PAIRS, share_prompt=True)
    assert honest.within(proof.EXACT)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not leaking.within(proof.TOLERANCES[dtype])


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_scale_or_cap_that_is_forgotten_is_found(family):
    subject = policy(family)
    quieten(subject)
    subject.head.shape = logps.PRODUCT
    assert not proof.compare(subject, PAIRS, share_prompt=False, num_parameters=0).within(proof.TOLERANCES[torch.float32])


def test_a_wrong_gradient_is_found_where_log_probs_are_right(monkeypatch):
    subject, right = policy(), logps._ChunkedLogps.backward
    quieten(subject)
    monkeypatch.setattr(logps._ChunkedLogps, "backward", staticmethod(lambda ctx, grad: right(ctx, grad * 1.5)))
    facts = proof.compare(subject, PAIRS, share_prompt=True)
    assert facts.max_nats <= proof.EXACT.max_nats and not facts.within(proof.TOLERANCES[torch.float32])
    with pytest.raises(BadInput, match="my-model: a packed row does not give what plain transformers gives") as caught:
        facts.check(proof.TOLERANCES[torch.float32], "my-model")
    assert "\n" not in str(caught.value) and "docs/models.md" in str(caught.value)


def test_what_is_no_number_is_never_within():
    subject = policy()
    quieten(subject)
    with torch.no_grad():
        subject.lm.model.norm.weight[0] = float("nan")
    assert not proof.compare(subject, PAIRS, share_prompt=True).within(proof.Tolerance(1e9, 1e9, 1e9))


def test_noise_that_is_left_on_is_found():
    subject = policy("gpt2").train()
    with pytest.raises(Exception, match="packed attention does not know its dropout"):
        proof.compare(subject, PAIRS, share_prompt=True, num_parameters=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_tolerance(dtype):
    lm = tiny_model(tiny_config("llama")).to(dtype)
    lm.set_attn_implementation(attention.NAME)
    subject = PolicyLogps(lm)
    quieten(subject)
    facts = proof.compare(subject, PAIRS, share_prompt=True)
    assert facts.within(proof.TOLERANCES[dtype]) and facts.max_nats > 1e-4, facts
