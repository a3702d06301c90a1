"""Loading tokenizers: what tokenizer.json says, what is exported, the user's template; real folders, as people have them."""

import json
import shutil
from pathlib import Path

import pytest
from made_tokenizers import MAKES, made
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from spin_ray.chat import ChatFormat
from spin_ray.config import Config, DataConfig, ModelConfig
from spin_ray.errors import BadInput
from spin_ray.model import inspect_model
from spin_ray.tokenizer import PROBE, load_tokenizer, read_template, save_tokenizer

TEMPLATE = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def save(folder: Path, make: str, *, tokenizer_class: str | None = None, config=LlamaConfig, vocab_size: int = 600, template: str | None = TEMPLATE) -> Path:
    """A model folder as the driver sees it: config, tokenizer, and a file of weights that is not opened."""
    tok = made(make, template, special=("<|user|>", "<|assistant|>"))
    tok.save_pretrained(folder)
    config(vocab_size=vocab_size, hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    if tokenizer_class:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": tokenizer_class}))
    return folder


def by_file(folder: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def ids(tok, text: str) -> list[int]:
    return tok(text, add_special_tokens=False)["input_ids"]


def inspect(folder: Path, **model):
    return inspect_model(Config(model=ModelConfig(path=str(folder), **model), data=DataConfig(train="demo:train")))


def test_folders_that_hold_no_whole_model_are_named(tmp_path):
    folder = save(tmp_path, "byte level")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(BadInput, match=r"no tokenizer in there \(tokenizer\.json, tokenizer\.model, tokenizer_config\.json\); copy|no tokenizer can be loaded"):
        inspect(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(BadInput, match=r"an adapter without its base; give the base as model\.path, and this as model\.adapter"):
        inspect(folder)


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_t1_what_tokenizer_json_says_is_loaded(tmp_path, named):
    folder = save(tmp_path, "byte level", tokenizer_class=named)
    wrong = AutoTokenizer.from_pretrained(folder)
    assert wrong.decode(ids(wrong, "Hello there\nyou")) == "Hellothereyou"  # the fault of transformers that this is about
    facts = inspect(folder)
    tok = facts.chat.tokenizer
    assert ids(tok, PROBE) == by_file(folder, PROBE) and tok.decode(ids(tok, PROBE)) == PROBE
    assert (tok.eos_token, tok.chat_template) == ("</s>", TEMPLATE)
    assert facts.tokenizer_line == f"model.path={folder}: transformers' LlamaTokenizer gives other ids than the folder's tokenizer.json; what tokenizer.json says is used"
    prompt_ids, answer_ids = facts.chat.encode([{"role": "user", "content": "Hello there\nyou"}], "See  you\n🙂")
    assert tok.decode(prompt_ids + answer_ids) == "<|user|>Hello there\nyou</s><|assistant|>See  you\n🙂</s>"


def test_t1_what_is_exported_is_loaded_as_the_same(tmp_path):
    folder, out = save(tmp_path / "model", "byte level", tokenizer_class="LlamaTokenizerFast"), tmp_path / "out"
    tok, _ = load_tokenizer(str(folder), False)
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_tokenizer(tok, out, False)
    again = AutoTokenizer.from_pretrained(out)
    assert ids(again, PROBE) == by_file(folder, PROBE) and again.chat_template == TEMPLATE and again.eos_token == "</s>"


@pytest.mark.parametrize("make", MAKES)
def test_other_tokenizers_are_loaded_as_they_are_and_export_the_same(tmp_path, make):
    folder, out = save(tmp_path / "model", make), tmp_path / "out"
    tok, line = load_tokenizer(str(folder), False)
    assert line == "" and ids(tok, PROBE) == by_file(folder, PROBE)
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_tokenizer(tok, out, False)


def test_an_export_that_would_be_loaded_as_another_tokenizer_is_refused(tmp_path):
    out = save(tmp_path / "out", "byte level", config=Qwen2Config)  # transformers takes Qwen2Tokenizer for it, whatever the folder says
    tok, _ = load_tokenizer(str(save(tmp_path / "llama", "legacy Llama")), False)
    with pytest.raises(BadInput, match="once saved, is loaded by transformers as Qwen2Tokenizer with another ids"):
        save_tokenizer(tok, out, False)


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path):
    folder = save(tmp_path, "byte level", tokenizer_class="LlamaTokenizer")
    tok = AutoTokenizer.from_pretrained(folder)  # the wrong one, saved as such: nothing is left to load instead
    tok.save_pretrained(folder)
    with pytest.raises(BadInput, match="its tokenizer makes 'HellothereHelloagain' of") as caught:
        load_tokenizer(str(folder), False)
    assert "\n" not in str(caught.value)


def test_m2_a_tokenizer_with_its_own_code_is_loaded_saved_and_loaded_again(tmp_path):
    folder, out = save(tmp_path / "model", "byte level"), tmp_path / "out"
    (folder / "own.py").write_text("from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}))
    with pytest.raises(BadInput, match=f"model.path={folder}: no tokenizer can be loaded from there"):
        load_tokenizer(str(folder), False)
    tok, line = load_tokenizer(str(folder), True)
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_tokenizer(tok, out, True)
    again, _ = load_tokenizer(str(out), True)
    assert type(again).__name__ == "OwnTokenizer" and ids(again, PROBE) == ids(tok, PROBE) and line == ""


# The user's template.

def test_t8_a_file_or_a_shipped_template_is_used_and_exported(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", "byte level", template=None)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    with pytest.raises(BadInput, match=r"no chat template; model\.chat_template takes one"):
        inspect(folder)
    assert inspect(folder, chat_template="~/mine.jinja").chat.tokenizer.chat_template == TEMPLATE
    tok = inspect(folder, chat_template="alpaca").chat.tokenizer
    assert tok.chat_template == read_template("alpaca")
    save_tokenizer(tok, folder, False)
    assert AutoTokenizer.from_pretrained(folder).chat_template == read_template("alpaca")


def test_t8_an_unknown_template_names_those_that_ship():
    with pytest.raises(BadInput, match=r"model\.chat_template=chatlm: no such file; give a Jinja file, or one of alpaca, chatml, gemma, llama2, llama3, mistral, vicuna, zephyr"):
        read_template("chatlm")


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe"])
def test_a_template_file_that_is_none(tmp_path, content):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.chat_template=.*t\.jinja") as caught:
        read_template(str(tmp_path / "t.jinja"))
    assert "\n" not in str(caught.value)


def test_a_shipped_template_whose_tokens_the_tokenizer_lacks_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"closes an answer with '<\|im_end\|>.*no token of the tokenizer"):
        inspect(save(tmp_path, "byte level"), chat_template="chatml")


# Tokens past the model's rows.

def test_m12_added_tokens_past_the_model_do_no_harm_unless_used(tmp_path):
    folder = save(tmp_path, "byte level", vocab_size=len(made("byte level", special=("<|user|>", "<|assistant|>"))))
    tok = AutoTokenizer.from_pretrained(folder)
    tok.add_tokens([AddedToken("[PAD]", special=True)])
    tok.save_pretrained(folder)
    chat = inspect(folder).chat
    assert isinstance(chat, ChatFormat) and chat.encode([{"role": "user", "content": "Hi"}], "See you")
    with pytest.raises(ValueError, match=r"token '\[PAD\]' has id \d+, and the model has"):
        chat.encode([{"role": "user", "content": "Hi [PAD]"}], "See you")
