"""The recipes for one GPU: each with a tiny model of the same family in its model's place, on this machine."""

import pytest
from test_run import ROOT, manifest, spin_ray
from transformers import AutoTokenizer

from spin_ray.bench.tiny import save_tiny
from spin_ray.config import load_config
from spin_ray.demo import resolve

FAMILIES = {
    "qwen3_0.6b_1gpu": "qwen3", "llama3.2_3b_lora_1gpu": "llama-tied", "zephyr7b_qlora_1gpu": "mistral", "zephyr7b_lora_1gpu": "mistral",
    "phi2_lora_1gpu": "phi",
}


def test_every_recipe_is_tried():
    assert set(FAMILIES) == {path.stem for path in (ROOT / "conf").glob("*_1gpu.yaml")}


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_recipe_is_accepted(recipe):
    load_config(f"conf/{recipe}.yaml", ["data.train=demo:train"])
    asked = spin_ray("config", f"conf/{recipe}.yaml")
    assert asked.returncode == 2 and "data.train is not set" in asked.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_recipe_runs(recipe, tmp_path):
    model = tmp_path / "model"
    save_tiny(FAMILIES[recipe], model)
    AutoTokenizer.from_pretrained(resolve("demo:base")).save_pretrained(model)
    done = spin_ray(
        "run", f"conf/{recipe}.yaml", f"model.path={model}", "data.train=demo:train", f"run.dir={tmp_path}", "run.name=run", "placement.mode=shared",
        "data.max_prompts=24", "data.max_prompt_tokens=96", "data.max_answer_tokens=48", "sampler.max_new_tokens=16", "sampler.block_prompts=8",
        "learner.batch_pairs=8", "spin.num_iterations=2", "spin.num_epochs=1", "tracking.wandb.mode=disabled",
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    firsts = [mark["report"]["first_loss"] for mark in manifest(tmp_path / "run") if mark["stage"] == "iteration"]
    assert firsts == pytest.approx([0.693147] * 2, abs=1e-3)
    assert (tmp_path / "run/iter_001/model/model.safetensors").exists()
    assert (tmp_path / "run/iter_001/adapter/adapter_model.safetensors").exists() == ("lora" in recipe)
