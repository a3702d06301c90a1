"""A low-rank adapter: the packed forward pass with it is transformers with merged weights; its files are peft's; what is none is refused."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from spin_ray.bench.tiny import COMPOSITE, FAMILIES, save_tiny, tiny_config
from spin_ray.config import Config, LoraConfig
from spin_ray.errors import BadInput
from spin_ray.exchange.adapters import AdapterFiles, read_adapter
from spin_ray.families import reason_to_refuse
from spin_ray.learner.adapter import Adapter, check_of_model, first_adapter, linear_layers
from spin_ray.learner.engine import load_model
from spin_ray.learner.logps import PolicyLogps
from spin_ray.learner.names import FolderNames, export_layout, shapes_of
from spin_ray.learner.packing import pack
from spin_ray.learner.proof import as_transformers_means_it, plain_logps
from spin_ray.theta import _check_given


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def made(tmp_path, family="llama", **lora):
    """A tiny model's folder, and beside it an adapter's that changes it."""
    save_tiny(family, tmp_path / "model")
    lm = load_model(str(tmp_path / "model"), dtype=torch.float32)
    files = first_adapter(lm, LoraConfig(**{"rank": 8, **lora}), base=str(tmp_path / "model"), seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in files.tensors.items():
        if "lora_B" in name:
            tensor.normal_(0.0, 0.1, generator=generator)
    files.write(tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter"


def in_folder(lm, adapter=None):
    """Folder's name -> tensor, merged where there is an adapter."""
    names, tensors = FolderNames(lm), {}
    for group in names.groups:
        members = zip(group.members, names.of(group), strict=True)
        tensors |= names.convert(group, [adapter.merged(name, t.detach()) if adapter else t.detach() for name, t in members])
    return tensors


def save_merged(model, tensors, folder):
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            (folder / name).write_bytes((model / name).read_bytes())
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


LEARNT = [family for family in [*FAMILIES, *COMPOSITE] if reason_to_refuse(tiny_config(family)) is None]
"""Families that the learner computes at all."""


@pytest.mark.parametrize("family", LEARNT)
def test_with_an_adapter_a_packed_row_gives_what_transformers_gives_for_merged_weights(family, tmp_path, make_pairs):
    model, folder = made(tmp_path, family)
    lm, pairs = load_model(str(model), dtype=torch.float32), make_pairs(3)
    base, exported, tied = in_folder(lm), shapes_of(export_layout(lm)), FolderNames(lm).tied()
    adapter = Adapter(lm, folder)
    assert shapes_of(export_layout(lm)) == exported and FolderNames(lm).tied() == tied
    merged = in_folder(lm, adapter)
    assert sum(not torch.equal(merged[name], base[name]) for name in base) >= len(adapter.parameters) / 2
    policy = PolicyLogps(lm)
    assert {id(p) for p in policy.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters.values()}
    with torch.no_grad():
        logps = policy(pack(pairs, share_prompt=False))
    save_merged(model, merged, tmp_path / "merged")
    other = load_model(str(tmp_path / "merged"), dtype=torch.float32)
    with torch.no_grad(), as_transformers_means_it(other):
        wanted = torch.cat([plain_logps(other, pair.prompt_ids, answer) for pair in pairs for answer in pair.answers if len(answer)])
    assert (logps - wanted).abs().max() < 2e-4


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "qwen3_moe"])
def test_the_folder_is_one_that_peft_reads(family, tmp_path):
    model, folder = made(tmp_path, family)
    ours = load_model(str(model), dtype=torch.float32)
    Adapter(ours, folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager"), folder).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), as_transformers_means_it(ours):
        assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)


def test_what_changes_nothing_yet_changes_nothing(tmp_path):
    save_tiny("llama", tmp_path)
    lm = load_model(str(tmp_path), dtype=torch.float32)
    files = first_adapter(lm, LoraConfig(rank=4, target=["q_proj", "down_proj"]), base="b", seed=0)
    assert len(files.tensors) == 2 * 2 * 2 and files.config["lora_alpha"] == 8 and files.config["target_modules"] == ["down_proj", "q_proj"]
    files.write(tmp_path / "adapter")
    before = in_folder(lm)
    adapter = Adapter(lm, tmp_path / "adapter")
    after = in_folder(lm, adapter)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merging_leaves_the_base_as_it_was_in_half_precision(tmp_path):
    model, folder = made(tmp_path)
    lm = load_model(str(model), dtype=torch.bfloat16)
    before = in_folder(lm)
    adapter = Adapter(lm, folder)
    for _ in range(3):
        merged = in_folder(lm, adapter)
    live = in_folder(lm)
    assert all(torch.equal(before[name], live[name]) for name in before) and {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize("change, says", [
    ({"use_dora": True}, "use_dora=True: DoRA cannot be trained or sampled here; merge it into its base"),
    ({"modules_to_save": ["lm_head"]}, "modules that it replaces"), ({"bias": "all"}, "bias=all: trained biases cannot"),
    ({"peft_type": "IA3"}, "no LoRA adapter (peft_type=IA3)"), ({"init_lora_weights": "pissa_niter_4"}, "changed the base as well"),
    ({"use_bdlora": {"nblocks": 2}}, "block-diagonal LoRA"), ({"r": None}, "r, the adapter's rank, is missing"),
])
def test_an_adapter_that_is_more_than_low_rank_is_refused(tmp_path, change, says):
    _, folder = made(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BadInput) as caught:
        read_adapter(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value)


def test_an_adapter_that_is_missing_damaged_or_another_model_s_is_named(tmp_path):
    model, folder = made(tmp_path)
    with pytest.raises(BadInput, match=r"no adapter there: adapter_config\.json is missing"):
        read_adapter(model)
    lm, config, tensors = (lambda: load_model(str(model), dtype=torch.float32)), read_adapter(folder).config, dict(read_adapter(folder).tensors)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    AdapterFiles(config, {key: value for key, value in tensors.items() if key != name}).write(folder)
    with pytest.raises(BadInput, match=rf"the adapter's file lacks {name}"):
        Adapter(lm(), folder)
    AdapterFiles(config, {**tensors, name.replace("layers.1", "layers.7"): tensors[name].clone()}).write(folder)
    with pytest.raises(BadInput, match=r"the model has no place for .*layers\.7"):
        Adapter(lm(), folder)
    AdapterFiles(config, {**tensors, name: tensors[name][:-1]}).write(folder)
    with pytest.raises(BadInput, match=r"up_proj\.lora_B\.weight is \[95, 8\], for this model it must be \[96, 8\]"):
        Adapter(lm(), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(BadInput, match="its adapter cannot be read"):
        read_adapter(folder)


def test_a_target_that_is_no_layer_is_named(tmp_path):
    save_tiny("llama", tmp_path)
    lm = load_model(str(tmp_path), dtype=torch.float32)
    assert {name.rpartition(".")[2] for name in linear_layers(lm)} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(BadInput, match=r"no linear layer wq; it has down_proj, gate_proj, k_proj"):
        first_adapter(lm, LoraConfig(rank=8, target=["q_proj", "wq"]), base="", seed=0)


@pytest.mark.parametrize("change, says", [
    ({".layers.1.mlp.up_proj.lora_A": ".embed_tokens.lora_embedding_A"}, "the base has no such linear layer below its output layer"),
    ({".model.layers.1.mlp.up_proj": ".lm_head"}, "lm_head.lora_A.weight: the base has no such linear layer below its output layer"),
    ({"layers.1": "layers.7"}, "layers.7.mlp.down_proj.lora_A.weight: the base has no such"),
    ({"layers.1.mlp.up_proj.lora_B": None}, "the adapter's {'lora_A': (8, 128)} do not fit it"),
    ({"up_proj": "down_proj", "down_proj": "up_proj"}, "takes 96 numbers and gives 128; the adapter's"),
    ({"": None}, "there is no tensor in its adapter"),
])
def test_an_adapter_of_another_model_is_refused_before_anything_starts(tmp_path, change, says):
    model, folder = made(tmp_path)
    files = read_adapter(folder)
    check_of_model(load_model(str(model), dtype=torch.float32), files, "F")
    changed = {}
    for name, tensor in files.tensors.items():
        old = next((old for old in change if old in name), None)
        if old is None or change[old] is not None:
            changed[name if old is None else name.replace(old, change[old])] = tensor
    with pytest.raises(BadInput) as caught:
        check_of_model(load_model(str(model), dtype=torch.float32), AdapterFiles(files.config, changed), "F")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("lora, says", [
    ({"rank": 16}, "has rank 8, and lora.rank=16: set lora.rank=8"), ({"alpha": 99.0}, "has alpha 16.0, and lora.alpha=99: leave it out"),
    ({"target": ["q_proj", "k_proj"]}, "and lora.target=['q_proj', 'k_proj']: leave it out"),
    ({"sync": "merged"}, "does not go with lora.sync=merged"),
])
def test_a_given_adapter_is_the_one_that_the_config_speaks_of(tmp_path, lora, says):
    model, folder = made(tmp_path, target=["q_proj", "v_proj"])
    same = {"rank": 8, "alpha": 16.0, "target": ["v_proj", "q_proj"]}
    _check_given(replace(Config(), lora=LoraConfig(rank=8)), str(model), str(folder))
    _check_given(replace(Config(), lora=LoraConfig(**same)), str(model), str(folder))
    with pytest.raises(BadInput) as caught:
        _check_given(replace(Config(), lora=LoraConfig(**{**same, **lora})), str(model), str(folder))
    assert says in str(caught.value)
