"""The one place that loads a tokenizer, and that sees to it that what is exported loads as the same one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spin_ray.errors import BadInput
from spin_ray.imports import without_gc

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
TEMPLATES = Path(__file__).parent / "templates"
PROBE = "Hello there,  two spaces and\ttab\n\nnext line. ¿Qué? 你好 🙂 x = 3.14; def f(a):\n    return a\n"
"""Spaces, runs of them, newlines, a tab, other scripts, an emoji, code."""
_WORDS = "Hello there\nHello again"


def load_tokenizer(path: str, trust_remote_code: bool, chat_template: str = "") -> tuple[Any, str]:
    """The tokenizer of a model folder or hub name, with another chat template, if its text is given, and a line to print ("": none).

    transformers chooses a class by `tokenizer_class` and may build another tokenizer than tokenizer.json says (a Llama
    tokenizer over a byte-level vocabulary loses every space). Then what the file says is loaded, and the line says so.
    Raises BadInput if there is none, if it loses the spaces or the letters of a text, or if the template cannot be had.
    """
    name = f"model.path={path}"
    with without_gc():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the class may be the model's own code, and the library raises a dozen unrelated types
        raise BadInput(f"{name}: no tokenizer can be loaded from there: {_first_line(error)}") from error
    if Path(path).is_dir() and not any((Path(path) / file).exists() for file in {*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}):
        raise BadInput(f"{name}: no tokenizer in there ({', '.join(TOKENIZER_FILES)}); copy the files of the model's tokenizer into it")
    tokenizer, line = _as_its_file_says(tokenizer, path, name)
    _refuse_lossy(tokenizer, name)
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer, line


def as_text(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """How token ids read, with special tokens, for people."""
    return lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def shipped_templates() -> dict[str, Path]:
    """Name -> file."""
    return {file.stem: file for file in sorted(TEMPLATES.glob("*.jinja"))}


def read_template(chosen: str) -> str:
    """The text of a chat template: of a file, or of a shipped one by its name; "" for none. Raises BadInput if it is neither.

    For the driver: what is computed elsewhere gets the text, not a path.
    """
    if not chosen:
        return ""
    shipped = shipped_templates()
    try:
        text = shipped.get(chosen, Path(chosen).expanduser()).read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # of a home that nobody has
        why = "no such file" if isinstance(error, FileNotFoundError) else _first_line(error)
        raise BadInput(f"model.chat_template={chosen}: {why}; give a Jinja file, or one of {', '.join(shipped)}") from error
    if not text.strip():
        raise BadInput(f"model.chat_template={chosen}: the file is empty")
    return text


def save_tokenizer(tokenizer: Any, folder: str | Path, trust_remote_code: bool) -> None:
    """Write the tokenizer beside a model's config.json. Raises BadInput if AutoTokenizer would make another one of it."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    for what, one, other in (
        ("ids", _ids(tokenizer), _ids(again)),
        ("chat template", tokenizer.chat_template, again.chat_template),
        ("EOS", tokenizer.eos_token_id, again.eos_token_id),
    ):
        if one != other:
            raise BadInput(
                f"{folder}: the tokenizer, once saved, is loaded by transformers as {type(again).__name__} with another {what}; "
                "set tokenizer_class in the model's tokenizer_config.json to the class that its tokenizer.json is of"
            )


def _as_its_file_says(tokenizer: Any, path: str, name: str) -> tuple[Any, str]:
    """The tokenizer itself, or what tokenizer.json says where that gives other ids, with a line about it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    if type(tokenizer) is PreTrainedTokenizerFast or type(tokenizer).__module__.startswith("transformers_modules"):
        return tokenizer, ""  # built from that file, or by code of the model's own, which decides
    file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    if file is None:
        return tokenizer, ""
    by_file = Tokenizer.from_file(file)
    by_file.no_truncation()
    by_file.no_padding()
    if _agree(tokenizer, by_file):
        return tokenizer, ""
    plain = PreTrainedTokenizerFast.from_pretrained(path)
    if _ids(plain) == _ids(tokenizer):
        return tokenizer, ""  # the class changes nothing: it is a setting of tokenizer_config.json (add_prefix_space) that does
    if not _agree(plain, by_file, with_added=False):
        raise BadInput(f"{name}: transformers reads its tokenizer.json as another tokenizer ({type(tokenizer).__name__})")
    if plain.chat_template is None:
        plain.chat_template = tokenizer.chat_template
    wrong = type(tokenizer).__name__
    return plain, f"{name}: transformers' {wrong} gives other ids than the folder's tokenizer.json; what tokenizer.json says is used"


def _agree(tokenizer: Any, by_file: Any, *, with_added: bool = True) -> bool:
    """Whether both give the same ids for the probe, and for it between added tokens."""
    texts = [PROBE]
    if with_added:
        texts += [f"One{token.content}two {token.content} three\n" for token in by_file.get_added_tokens_decoder().values()][:8]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] == [by_file.encode(text, add_special_tokens=False).ids for text in texts]


def _refuse_lossy(tokenizer: Any, name: str) -> None:
    """A tokenizer that loses spaces or letters of plain words is not the model's. One that does not know them says so: unknown."""
    ids = tokenizer(_WORDS, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    known = tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    if known and text.lower().split() != _WORDS.lower().split():
        raise BadInput(f"{name}: its tokenizer makes {text!r} of {_WORDS!r}; see tokenizer_class in tokenizer_config.json")


def _ids(tokenizer: Any) -> list[list[int]]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values()][:256]
    return tokenizer([PROBE, *(f"One{token}two {token} three\n" for token in added)], add_special_tokens=False)["input_ids"]


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
