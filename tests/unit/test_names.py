"""What leaves the learner has the names and shapes of the folder that came in, for every family that transformers can make."""


import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from spin_ray.bench.tiny import COMPOSITE, FAMILIES, VOCAB, save_tiny, tiny_config
from spin_ray.ending import blank_model
from spin_ray.errors import BadInput, RunStopped
from spin_ray.exchange.weights import shapes_in
from spin_ray.learner.export import check_export_names, write_model
from spin_ray.learner.names import FolderNames, export_layout, shapes_of


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(folder, family=""):
    auto = AutoModelForImageTextToText if family in COMPOSITE else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32)


def buckets_of(lm):
    """As `MainPlayer.weights` makes them, a group each; live weights."""
    names = FolderNames(lm)
    for group in names.groups:
        yield list(names.convert(group, [tensor.detach() for tensor in names.of(group)]).items())


def tensors_in(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", [*FAMILIES, *COMPOSITE])
def test_an_export_is_the_folder_that_came_in_key_by_key(family, tmp_path):
    source, ours, theirs = tmp_path / "source", tmp_path / "ours", tmp_path / "theirs"
    save_tiny(family, source)
    lm = load(source, family)
    write_model(lm, buckets_of(lm), ours, {}, file_bytes=200_000)
    lm.save_pretrained(theirs)
    assert shapes_of(export_layout(lm)) == shapes_in(source) == shapes_in(theirs) == shapes_in(ours)
    assert check_export_names(lm, source) == []
    came, left = tensors_in(source), tensors_in(ours)
    assert all(torch.equal(came[name], left[name]) for name in came)
    assert len(list(ours.glob("*.safetensors"))) > 1
    if family not in COMPOSITE:
        assert shapes_of(export_layout(blank_model(str(source), tiny_config(family), trust_remote_code=False))) == shapes_in(source)


def test_a_plain_model_s_tensors_are_the_live_weights(tmp_path):
    save_tiny("llama", tmp_path)
    lm = load(tmp_path)
    live = {parameter.data_ptr() for parameter in lm.parameters()}
    assert {tensor.data_ptr() for bucket in buckets_of(lm) for _, tensor in bucket} == live


def test_experts_and_buffers_have_the_checkpoint_s_names():
    with torch.device("meta"):
        mixtral = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
        deepseek = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"))
    assert shapes_of(export_layout(mixtral))["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == (128, 96)
    assert shapes_of(export_layout(deepseek))["model.layers.1.mlp.gate.e_score_correction_bias"] == (4,)
    assert shapes_of(export_layout(deepseek))["model.layers.1.mlp.experts.0.gate_proj.weight"] == (32, 128)


def test_tied_names_are_the_folder_s_too(tmp_path):
    save_tiny("gemma3", tmp_path)
    assert FolderNames(load(tmp_path)).tied() == {"lm_head.weight": "language_model.model.embed_tokens.weight"}


def edited(folder, edit):
    """The folder's tensors after `edit` has changed the dict of them; and what `check_end` says to it, without its tokenizer."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    from transformers import AutoConfig

    return check_export_names(blank_model(str(folder), AutoConfig.from_pretrained(folder), trust_remote_code=False), folder)


def test_a_tensor_that_no_file_holds_is_refused_at_the_door(tmp_path):
    save_tiny("llama", tmp_path)
    lm = load(tmp_path)
    lm.model.register_buffer("table", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(BadInput, match=r"could not be saved: model\.table is complex64"):
        check_export_names(lm, tmp_path)


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


@pytest.mark.parametrize(("family", "edit"), [
    ("llama-tied", add("lm_head.weight", VOCAB, 128)),
    ("llama", add("model.layers.1.self_attn.rotary_emb.inv_freq", 16)),
    ("gpt_neox", add("gpt_neox.layers.0.attention.masked_bias")),
    ("gpt2", without_prefix),
    ("apertus", drop("model.layers.0.mlp.act_fn.beta")),
])
def test_differences_that_change_nothing_are_allowed(family, edit, tmp_path):
    save_tiny(family, tmp_path)
    assert edited(tmp_path, edit) == []


@pytest.mark.parametrize(("family", "edit", "says"), [
    ("llama", add("score.weight", 1, 128), r"not that of its weights: 1 tensors are in the folder alone \(first score.weight\)"),
    ("llama", drop("lm_head.weight"), r"not that of its weights: 1 are in the model alone \(first lm_head.weight\)"),
    ("mixtral", drop("model.layers.0.block_sparse_moe.gate.weight"), r"in the model alone \(first model.layers.0.block_sparse_moe.gate.weight\)"),
    ("llama", add("model.norm.weight", 64), r"1 differ in shape \(first model.norm.weight: \[128\], in the folder \[64\]\)"),
])
def test_a_folder_that_an_export_would_not_equal_is_refused_in_one_line(family, edit, says, tmp_path):
    save_tiny(family, tmp_path)
    with pytest.raises(BadInput, match=says) as refused:
        edited(tmp_path, edit)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"\0" * 200, b""])
def test_weights_that_are_none_are_refused_in_one_line(content, tmp_path):
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="its weights cannot be read; are its files complete, or still git-lfs pointers") as refused:
        blank_model(str(tmp_path), tiny_config("llama"), trust_remote_code=False)
    assert "\n" not in str(refused.value)


def test_layers_that_predict_further_tokens_are_left_out_with_a_word(tmp_path):
    save_tiny("deepseek_v3", tmp_path)
    [note] = edited(tmp_path, add("model.layers.61.eh_proj.weight", 128, 256))
    assert "1 tensors that transformers does not load (model.layers.61.eh_proj.weight, ...) are not trained and not exported" in note


def test_an_export_that_lacks_a_tensor_stops_the_run(tmp_path):
    save_tiny("llama", tmp_path / "source")
    lm = load(tmp_path / "source")
    with pytest.raises(RunStopped, match=r"1 of the model's tensors were not written \(first lm_head.weight\)"):
        write_model(lm, list(buckets_of(lm))[:-1], tmp_path / "out", {})
