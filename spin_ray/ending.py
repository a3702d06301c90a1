"""Whether what the end of an iteration needs will work, tried at the start: a model that cannot be saved must not cost a training.

Nothing here reads or writes weights. What is tried is what the learner does when it exports (learner/export.py): config, generation
config, tokenizer and code are saved to a scratch folder and loaded from there; the names and shapes of the export's tensors are
computed through transformers' own loader and compared with the folder's.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin_ray.errors import BadInput, in_one_line
from spin_ray.imports import without_gc
from spin_ray.tokenizer import load_tokenizer

_PROBE = "Ünïcode, <tags>, numbers 1,234.5 and\n\n\tspace  at the end "


def check_end(path: str, *, trust_remote_code: bool, chat_template: str = "") -> list[str]:
    """Try to save the model at `path`, a folder or a name on the hub, without its weights.

    Returns lines for the user about what an export leaves out or keeps as it is. Raises BadInput in one line for what would fail.
    """
    with without_gc():
        from transformers import AutoConfig

        from spin_ray.learner.export import check_export_names

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    notes = _try_small_files(path, config, trust_remote_code, chat_template)
    if not Path(path).is_dir():
        return notes  # on the hub: weights come with the learner, which compares them when it starts
    lm = blank_model(path, config, trust_remote_code=trust_remote_code)
    return notes + (check_export_names(lm, Path(path)) if lm is not None else [])


def _try_small_files(path: str, config: Any, trust_remote_code: bool, chat_template: str) -> list[str]:
    from transformers import AutoConfig

    from spin_ray.learner.export import read_beside, write_beside

    beside = read_beside(path, trust_remote_code=trust_remote_code, chat_template=chat_template)
    with tempfile.TemporaryDirectory(prefix="spin_ray_") as scratch:
        with _as_bad_input(path, "its config and tokenizer do not survive being saved"):
            config.save_pretrained(scratch)
            write_beside(beside, Path(scratch))
            again = AutoConfig.from_pretrained(scratch, trust_remote_code=trust_remote_code)
            saved, _ = load_tokenizer(scratch, trust_remote_code)
        _same(path, "config", _essence(config), _essence(again))
        _same(path, "tokenizer", _answers(load_tokenizer(path, trust_remote_code, chat_template)[0]), _answers(saved))
    return _about_generation(path, beside)


def _essence(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version", "auto_map")}


def _answers(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer says to a probe, and what it knows."""
    ids = tokenizer(_PROBE)["input_ids"]
    return {
        "number of tokens": len(tokenizer), "chat template": tokenizer.chat_template, "ids of a probe": ids,
        "text of a probe": tokenizer.decode(ids), "special tokens": tokenizer.special_tokens_map,
    }


def _same(path: str, what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if before[key] != after.get(key):
            raise BadInput(
                f"model.path={path}: saved and loaded again, its {what} has another {key} "
                f"({_short(after.get(key))} for {_short(before[key])}); a trained model would not mean the same"
            )


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."


def _about_generation(path: str, beside: dict[str, bytes]) -> list[str]:
    """A line where transformers would refuse to save the folder's generation config; raises BadInput where it is no JSON object."""
    from transformers import GenerationConfig

    if (content := beside.get("generation_config.json")) is None:
        return []
    with _as_bad_input(path, "generation_config.json cannot be read; mend or remove it"):
        generation = GenerationConfig(**json.loads(content))
    try:
        generation.validate(strict=True)
    except ValueError as error:
        warning = _first_clause(error)
        return [f"{path}: generation_config.json goes into every exported model as it is, though transformers warns: {warning}"]
    return []


def _first_clause(error: Exception) -> str:
    lines = [line.strip("- ").strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0])[:200]


def blank_model(path: str, config: Any, *, trust_remote_code: bool) -> Any:
    """The model of a folder as transformers loads it, but without weights: on torch's meta device, in a fraction of a second.

    None for code of the folder's own that cannot run there; the learner has the real model to look at. Raises BadInput where the
    folder's tensors do not fit its config.
    """
    import torch

    from spin_ray.exchange.weights import shapes_in
    from spin_ray.families import auto_class

    with _as_bad_input(path, "its weights cannot be read; are its files complete, or still git-lfs pointers?"):
        blank = {name: torch.empty(shape, device="meta") for name, shape in shapes_in(Path(path)).items()}
    try:
        with torch.device("meta"):
            kind = type(auto_class(config).from_config(config, trust_remote_code=trust_remote_code))
        with _quiet():
            return kind.from_pretrained(  # other shapes are told by check_export_names, with the tensor's name
                None, config=config, state_dict=blank, device_map={"": "meta"}, ignore_mismatched_sizes=True,
            )
    except Exception as error:
        if getattr(config, "auto_map", None):
            return None
        raise BadInput(f"model.path={path}: transformers cannot load its weights ({in_one_line(error)[:300]})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar, and reports what check_export_names says in one line."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _as_bad_input(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers, tokenizers and a folder's own code raise whatever they like
        raise BadInput(f"model.path={path}: {what} ({type(error).__name__}: {in_one_line(error)[:200]})") from error
