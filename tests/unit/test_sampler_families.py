"""What the sampler cannot play with is said before anything starts, from the config alone."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from spin_ray.bench.tiny import FAMILIES, tiny_config
from spin_ray.sampler.families import sampler_refusal


@pytest.mark.parametrize(("config", "on_gpus", "says"), [
    (LlamaConfig(hidden_size=64, num_attention_heads=4), False, "vLLM has no attention on a CPU for heads of 16"),
    (LlamaConfig(hidden_size=64, num_attention_heads=4), True, None),
    (LlamaConfig(hidden_size=64, num_attention_heads=2), False, None),
    (AutoConfig.for_model("gpt_oss"), True, "cannot replace a GPT-OSS model's weights in place"),
    (AutoConfig.for_model("deepseek_v3"), False, r"latent attention \(deepseek_v3\) gives wrong log-probs on a CPU"),
    (AutoConfig.for_model("deepseek_v3"), True, None),
])
def test_known_facts(config, on_gpus, says):
    found = sampler_refusal(config, on_gpus=on_gpus)
    assert found is None if says is None else re.search(says, found), found


def test_a_model_that_is_only_evaluated_need_not_be_reloaded():
    assert sampler_refusal(AutoConfig.for_model("gpt_oss"), on_gpus=True, reloads=False) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_answer(family):
    found = sampler_refusal(tiny_config(family), on_gpus=False)
    assert found is None or ("\n" not in found and len(found) < 120)


MEASURED = json.loads((Path(__file__).parents[2] / "docs" / "samplers.json").read_text())


@pytest.mark.parametrize("family", MEASURED)
def test_what_was_measured_is_what_is_refused(family):
    works = set(MEASURED[family].values()) == {"exact"}
    assert works == (sampler_refusal(tiny_config(family), on_gpus=False) is None), MEASURED[family]
