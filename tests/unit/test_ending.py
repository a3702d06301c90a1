"""What the end of an iteration needs is tried at the start: configs, tokenizers and code as people have them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from spin_ray.ending import check_end
from spin_ray.errors import BadInput
from spin_ray.learner.export import read_beside, write_model
from spin_ray.learner.names import FolderNames


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model(tied=True), tmp_path / "source")


def export(source: Path, out: Path, *, trust: bool = False):
    """As a learner does it: what is beside the weights is read first, and at the end the source is gone."""
    lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=trust)
    beside = read_beside(str(source), trust_remote_code=trust)
    shutil.rmtree(source)
    names = FolderNames(lm)
    write_model(lm, ([(group.name, names.of(group)[0].detach())] for group in names.groups), out, beside)
    return lm


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def add_to(folder: Path, name: str, **values: object) -> None:
    write(folder, name, json.loads((folder / name).read_text()) | values)


@pytest.mark.parametrize("generation", [
    {"temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"},  # Vicuna, Llama 2
    {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.6},
    {"do_sample": False, "top_k": 20, "eos_token_id": [1, 2]},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
])
def test_generation_configs_that_transformers_refuses_to_save_go_along_as_they_are(generation, folder, tmp_path):
    write(folder, "generation_config.json", generation)
    with pytest.raises(ValueError):
        GenerationConfig.from_pretrained(folder).save_pretrained(tmp_path)
    [line] = check_end(str(folder), trust_remote_code=False)
    assert "generation_config.json goes into every exported model as it is" in line and "\n" not in line
    export(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("generation", [None, {"do_sample": True, "temperature": 0.7}])
def test_a_valid_generation_config_and_none_need_no_word(generation, folder, tmp_path):
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation:
        write(folder, "generation_config.json", generation)
    assert check_end(str(folder), trust_remote_code=False) == []
    export(folder, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").exists() == bool(generation)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "nothing"])
def test_a_generation_config_that_cannot_be_read_is_refused_in_one_line(content, folder):
    write(folder, "generation_config.json", content)
    with pytest.raises(BadInput, match=r"generation_config.json cannot be read; mend or remove it \(") as refused:
        check_end(str(folder), trust_remote_code=False)
    assert "\n" not in str(refused.value)


OWN_TOKENIZER = '''
from transformers import PreTrainedTokenizerFast
from .own_words import GREETING

class OwnTokenizer(PreTrainedTokenizerFast):
    greeting = GREETING
'''


def test_a_tokenizer_with_code_of_its_own_is_exported_with_it(folder, tmp_path):
    write(folder, "tokenization_own.py", OWN_TOKENIZER)
    write(folder, "own_words.py", "GREETING = 'hello'\n")
    add_to(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})
    before = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a b c")["input_ids"]
    assert check_end(str(folder), trust_remote_code=True) == []
    export(folder, tmp_path / "out", trust=True)
    again = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (type(again).__name__, again.greeting, again("a b c")["input_ids"]) == ("OwnTokenizer", "hello", before)


OWN_MODEL = '''
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
'''
OWN_CONFIG = '''
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
'''


def test_a_model_with_code_of_its_own_is_exported_with_it(folder, tmp_path):
    write(folder, "modeling_own.py", OWN_MODEL)
    write(folder, "configuration_own.py", OWN_CONFIG)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    add_to(folder, "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
    assert check_end(str(folder), trust_remote_code=True) == []
    lm = export(folder, tmp_path / "out", trust=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in lm.state_dict().items())


def test_a_tokenizer_that_cannot_be_saved_is_refused_in_one_line(folder):
    write(folder, "tokenization_own.py", OWN_TOKENIZER.replace("greeting = GREETING", '''def save_pretrained(self, folder):
        raise RuntimeError("no.\\nNever.")'''))
    write(folder, "own_words.py", "GREETING = 'hello'\n")
    add_to(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})
    with pytest.raises(BadInput, match=r"its tokenizer cannot be saved with a trained model \(Never.\)"):
        check_end(str(folder), trust_remote_code=True)


def test_a_tokenizer_that_changes_when_it_is_saved_is_refused_in_one_line(folder):
    write(folder, "tokenization_own.py", OWN_TOKENIZER.replace("greeting = GREETING", '''def save_pretrained(self, folder):
        self.chat_template = "another"
        return super().save_pretrained(folder)'''))
    write(folder, "own_words.py", "GREETING = 'hello'\n")
    add_to(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})
    with pytest.raises(BadInput, match="saved and loaded again, its tokenizer has another chat template"):
        check_end(str(folder), trust_remote_code=True)


def test_small_files_go_along_and_those_about_other_weights_do_not(folder, tmp_path):
    for name in ("LICENSE", "USE_POLICY.md", "merges.txt", "tokenizer.model", "README.md", "pytorch_model.bin", "model.gguf", "training_args.bin"):
        write(folder, name, f"this is {name}")
    template = AutoTokenizer.from_pretrained(folder).chat_template
    export(folder, tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there >= {"LICENSE", "USE_POLICY.md", "merges.txt", "tokenizer.model", "tokenizer.json", "config.json", "model.safetensors"}
    assert not there & {"README.md", "pytorch_model.bin", "model.gguf", "training_args.bin"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
