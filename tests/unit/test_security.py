"""A model folder is data: nothing in it is run, and no pickle is opened, unless the user asked for it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from spin_ray.config import Config, DataConfig, ModelConfig, load_config
from spin_ray.errors import BadInput
from spin_ray.model import inspect_model

CONFIGS = sorted((Path(__file__).parents[2] / "conf").glob("*.yaml"))


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self._folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self._folder),)


@pytest.fixture
def model(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model(tied=True), tmp_path / "model"))


def inspect(model, **options):
    return inspect_model(Config(model=ModelConfig(path=str(model), **options), data=DataConfig(train="demo:train")))


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("file, auto_map", [
    ("config.json", {"AutoConfig": "code.Own"}), ("tokenizer_config.json", {"AutoTokenizer": ["code.Own", None]}),
])
def test_code_that_ships_with_a_model_runs_only_if_asked_for(model, tmp_path, file, auto_map):
    (model / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    change(model / file, auto_map=auto_map)
    change(model / file, **({"model_type": "own"} if file == "config.json" else {"tokenizer_class": "Own"}))
    try:
        inspect(model)
    except BadInput as error:
        assert str(model) in str(error) and "\n" not in str(error)
    assert not (tmp_path / "ran").exists()
    try:
        inspect(model, trust_remote_code=True)
    except Exception as error:  # it is no real config or tokenizer
        assert str(error)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_no_shipped_config_asks_for_it(path):
    assert load_config(path, ["model.path=x", "data.train=x"])[0].model.trust_remote_code is False


def test_pickled_weights_are_refused_by_name(model, tmp_path):
    torch.save({"weight": RunsCode(tmp_path / "ran")}, model / "pytorch_model.bin")
    inspect(model)  # safetensors lie beside them
    (model / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no \*\.safetensors in there; pickled weights"):
        inspect(model)
    assert not (tmp_path / "ran").exists()
