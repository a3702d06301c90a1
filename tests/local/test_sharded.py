"""A model read in shards is the model of its folder, bit by bit, for every family that the learner trains; no rank holds a whole tensor of it."""

import json

import pytest
from launched import run_ranks
from safetensors.torch import load_file, save_file

from spin_ray.bench.tiny import COMPOSITE, FAMILIES, save_tiny, tiny_config
from spin_ray.families import reason_to_refuse

TRAINED = [family for family in [*FAMILIES, *COMPOSITE] if not reason_to_refuse(tiny_config(family))]


def with_head(folder, *, equal):
    """A folder whose config ties the two embeddings, and that holds both all the same."""
    save_tiny("llama-tied", folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding + 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Rank -> {model and dtype: what differs}."""
    folder = tmp_path_factory.mktemp("sharded")
    for family in TRAINED:
        save_tiny(family, folder / family)
    with_head(folder / "tied-twice", equal=True)
    with_head(folder / "tied-in-the-config-alone", equal=False)
    (logs := folder.with_name("logs")).mkdir()
    run_ranks("sharded_ranks.py", folder, world_size=2, logs=logs)
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [*TRAINED, "tied-twice", "tied-in-the-config-alone"])
def test_a_model_in_shards_is_the_model_of_its_folder(found, model, dtype):
    assert found[0][f"{model} {dtype}"] == found[1][f"{model} {dtype}"] == []
