"""The door's comparison: it holds for a right model, and notices what packing can get wrong."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_ray.errors import BadInput
from spin_ray.learner import attention, logps, proof
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.proof import EXACT, compare


@pytest.fixture
def policy(tiny_model):
    return PolicyLogps(AutoModelForCausalLM.from_pretrained(tiny_model(tied=True), dtype=torch.float32, attn_implementation=attention.NAME))


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_right_model_passes_and_is_left_as_it_was(policy, make_pairs, share_prompt):
    policy.train()
    facts = compare(policy, make_pairs(4), share_prompt=share_prompt, num_parameters=None)
    assert facts.within(EXACT), facts
    assert facts.parameter and policy.lm.training and policy.lm.config._attn_implementation == attention.NAME
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_answers_that_see_each_other_are_noticed(policy, make_pairs, monkeypatch):
    real = attention.CurrentRow.masks
    monkeypatch.setattr(attention.CurrentRow, "masks", lambda self, window: [None for _ in real(self, window)])
    facts = compare(policy, make_pairs(4), share_prompt=True)
    with pytest.raises(BadInput, match="my-model: a packed row does not give what plain transformers gives") as caught:
        facts.check(proof.TOLERANCES[torch.float32], "my-model")
    assert "\n" not in str(caught.value) and "docs/models.md" in str(caught.value)


def test_a_wrong_gradient_is_noticed_where_log_probs_are_right(policy, make_pairs, monkeypatch):
    real = logps._ChunkedLogps.backward
    monkeypatch.setattr(logps._ChunkedLogps, "backward", staticmethod(lambda ctx, grad: real(ctx, grad * 1.5)))
    facts = compare(policy, make_pairs(4), share_prompt=True)
    assert facts.max_nats <= EXACT.max_nats and not facts.within(proof.TOLERANCES[torch.float32])


def test_a_number_that_is_none_is_never_within(policy, make_pairs):
    with torch.no_grad():
        policy.lm.model.norm.weight[0] = float("nan")
    assert not compare(policy, make_pairs(2), share_prompt=True).within(dataclasses.replace(EXACT, max_nats=1e9, mean_nats=1e9, gradient=1e9))
