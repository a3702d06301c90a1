"""What the plan counts without weights is what autograd keeps of a real forward pass."""

from dataclasses import replace

import pytest
import torch

from spin_ray.bench.tiny import FAMILIES, save_tiny, tiny_config
from spin_ray.bench.workload import Lengths, random_pairs
from spin_ray.config import LoraConfig
from spin_ray.errors import BadInput
from spin_ray.families import reason_to_refuse
from spin_ray.learner.engine import load_model
from spin_ray.learner.logps import PolicyLogps, body
from spin_ray.learner.modes import quieten
from spin_ray.learner.packing import pack
from spin_ray.look.plan.activations import Row
from spin_ray.look.plan.shapes import read_shapes

ROW = Row(5, 16, (23, 23))


def counted(family, folder, **lora):
    shapes = read_shapes(str(folder), tiny_config(family), LoraConfig(**lora), dtype="float32", in_4_bits=False)
    return shapes, *shapes.activations(ROW, on_gpu=False)


def kept(lm):
    """Bytes that a forward pass of the same row keeps below the output layer."""
    policy = PolicyLogps(lm)
    quieten(policy)
    packed = pack(random_pairs(5, vocab_size=640, lengths=Lengths(16, 24, 0.0)), share_prompt=True)
    assert len(packed.input_ids) == ROW.tokens
    storages = {}
    known = {parameter.untyped_storage()._cdata for parameter in lm.parameters()}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        policy._row.begin(packed)
        body(lm)(input_ids=packed.input_ids[None], position_ids=packed.position_ids[None], use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma", "phi3", "olmo2"])
def test_as_many_bytes_as_a_real_forward_pass_keeps(family, tmp_path):
    save_tiny(family, tmp_path)
    shapes, activations, exact = counted(family, tmp_path)
    lm = load_model(str(tmp_path), dtype=torch.float32)
    assert exact and shapes.model.total == sum(p.numel() for p in lm.parameters())
    head = 3 * ROW.answer_tokens * shapes.width * 4
    assert activations.layers + activations.around - head == pytest.approx(kept(lm), rel=0.05)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not reason_to_refuse(tiny_config(name))])
def test_every_family_that_can_be_trained_can_be_planned(family, tmp_path):
    _, activations, exact = counted(family, tmp_path)
    assert 0 < activations.layer_inputs < activations.layers and activations.largest_layer <= activations.layers
    assert exact or family == "gpt2" or "num_experts_per_tok" in FAMILIES[family]


def test_an_adapter_is_counted_and_all_else_is_frozen(tmp_path):
    whole, adapter = (counted("llama", tmp_path, rank=rank)[0].model for rank in (0, 8))
    per_layer = 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 96))
    assert adapter.trained == 2 * per_layer and adapter.total == whole.total + adapter.trained
    assert whole.trained == whole.total and whole.head_is_trained and not adapter.head_is_trained


def test_a_row_twice_as_long_keeps_twice_as_much(tmp_path):
    shapes, once, _ = counted("llama", tmp_path)
    twice, _ = shapes.activations(replace(ROW, trees=10), on_gpu=False)
    assert twice.layers == pytest.approx(2 * once.layers, rel=0.01)


def test_a_target_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"lora.target: this model has no linear layer no_proj"):
        counted("llama", tmp_path, rank=8, target=["no_proj"])
