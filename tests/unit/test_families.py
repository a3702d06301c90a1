"""Families: what is refused from the config alone, what is said, and the fast part of `bench models`."""

import pytest
import torch
from transformers import AutoConfig

from spin_ray.bench import models
from spin_ray.bench.random_models import PAIRS, families, tiny_config, tiny_model
from spin_ray.errors import BadInput
from spin_ray.families import final_scale_and_cap, longest_exact, noise, reason_to_refuse
from spin_ray.learner import attention, proof
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.meters import ModelFlops
from spin_ray.learner.modes import checkpoint_activations, quieten
from spin_ray.lengths import Lengths
from spin_ray.model import ModelFacts, longest_sequence, refuse_unsupported
from spin_ray.records import Prompt

FAST = [
    "phi", "gemma2", "gemma3", "cohere", "granite", "gpt_oss", "mistral", "opt", "stablelm", "nemotron", "gpt2", "mixtral", "deepseek_v3",
    "minicpm3", "phimoe", "qwen2_5_vl",
]


@pytest.mark.parametrize("family", FAST)
def test_family_is_computed_and_exported_as_transformers_does(family, monkeypatch):
    monkeypatch.setattr("spin_ray.bench.random_models.variants", lambda _: [{}])
    found = models.examine(family)
    assert found.status == "exact", found.why
    assert found.max_nats < 5e-5 and found.gradient < 5e-4


@pytest.mark.parametrize(("family", "words"), [
    ("lfm2", "whose layers keep a state"), ("qwen3_next", "whose layers keep a state"), ("jamba", "whose layers keep a state"),
    ("falcon", "whose attention cannot be chosen"), ("bloom", "whose attention cannot be chosen"), ("llama4_text", "attention in chunks"),
    ("doge", "a mask of its own"), ("bart", "was not found to be computed exactly"), ("got_ocr2", "composite family got_ocr2"),
])
def test_families_that_would_be_wrong_are_refused_by_name(family, words):
    with pytest.raises(BadInput, match=rf"^model.path=x: the model is of the .*{family}.*; docs/models.md lists") as error:
        refuse_unsupported(AutoConfig.for_model(family), "model.path=x")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "options", "words"), [
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "only causal attention"),
    ("qwen3", {"num_hidden_layers": 2, "layer_types": ["full_attention", "chunked_attention"]}, "layers of the kind chunked_attention"),
    ("phimoe", {"sliding_window": 64}, "has sliding_window=64"),
])
def test_options_that_would_be_wrong_are_refused_by_name(family, options, words):
    assert words in reason_to_refuse(AutoConfig.for_model(family, **options))
    assert reason_to_refuse(AutoConfig.for_model(family)) is None


def test_every_family_of_transformers_is_decided():
    decided = {family: reason_to_refuse(AutoConfig.for_model(family)) for family in families() if not family.startswith("musicgen")}
    assert sum(reason is None for reason in decided.values()) >= 80
    assert all("\n" not in reason for reason in decided.values() if reason)


def test_scale_and_cap_by_hand():
    assert final_scale_and_cap(AutoConfig.for_model("llama")) == (1.0, None)
    assert final_scale_and_cap(AutoConfig.for_model("gemma2")) == (1.0, 30.0)
    assert final_scale_and_cap(AutoConfig.for_model("cohere")) == (0.0625, None)
    assert final_scale_and_cap(AutoConfig.for_model("granite", logits_scaling=8.0)) == (0.125, None)
    assert final_scale_and_cap(AutoConfig.for_model("hyperclovax", logits_scaling=8.0)) == (8.0, None)


def test_noise_is_named_and_switched_off():
    config = tiny_config("gpt2")
    assert noise(config) == {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    assert noise(AutoConfig.for_model("llama")) == {}
    lm = tiny_model(config).train()
    lm.set_attn_implementation(attention.NAME)
    lm.gradient_checkpointing_enable()
    policy = PolicyLogps(lm)
    quieten(policy)
    for recompute in (True, False):
        checkpoint_activations(lm, recompute)
        facts = proof.compare(policy, PAIRS, share_prompt=True)
        assert facts.within(proof.EXACT), facts
    assert lm.config.resid_pdrop == 0.2  # what is exported


def test_longrope_bounds_a_run():
    factors = [1.0] * 16
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "phi3", hidden_size=128, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, rope_parameters=rope,
        original_max_position_embeddings=64,
    )
    assert longest_exact(config) == 64 and longest_exact(AutoConfig.for_model("llama")) is None
    facts = ModelFacts("m", None, "", 256, config, longest_exact=64)
    prompt = Prompt(0, torch.arange(40).numpy(), torch.arange(10).numpy())
    assert longest_sequence(Lengths.of([prompt]), 20, facts) == 61
    with pytest.raises(BadInput, match="more than 64 tokens, and this run needs 71"):
        longest_sequence(Lengths.of([prompt]), 30, facts)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi", "mixtral", "gemma3"])
def test_flops_of_other_families(family):
    """Never less than the matrices of one layer times the layers, and a mixture counts the experts a token is sent to."""
    lm = tiny_model(tiny_config(family))
    flops = ModelFlops.of(lm)
    total = sum(p.numel() for p in lm.parameters())
    assert flops.head == lm.get_output_embeddings().weight.numel()
    assert 0.2 * total < flops.layers + flops.head < 1.2 * total or family == "gemma3"  # most of that one sees pictures
