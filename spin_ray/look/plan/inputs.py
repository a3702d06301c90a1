"""What a plan is made from: the model's config, and how long the rows are. Read where they are there, else given."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from spin_ray.config import Config
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.imports import without_gc
from spin_ray.look.plan.rows import Texts, given, read
from spin_ray.model import inspect_model, refuse_unsupported


@dataclass(frozen=True)
class Asked:
    """The command's flags; None: not given."""

    gpu_memory_gib: float | None = None
    sampler_tokens_per_s: float | None = None
    learner_tokens_per_s: float | None = None
    price_per_gpu_hour: float | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    num_prompts: int | None = None

    def __post_init__(self) -> None:
        for name in self.names():
            if (value := getattr(self, name)) is not None and not value > 0:
                raise BadInput(f"--{name.replace('_', '-')} {value:g}: must be above 0")

    @classmethod
    def names(cls) -> list[str]:
        """Of the flags, with underscores."""
        return [entry.name for entry in fields(cls)]


@dataclass(frozen=True)
class Inputs:
    path: str
    """The model's folder or name."""
    model: Any
    """transformers' config."""
    adapter_rank: int
    """Of model.adapter; 0 without one."""
    texts: Texts
    source: str
    """Where the model's shapes are from, in words."""


GIVE = "--prompt-tokens N --answer-tokens N --num-prompts N"


def read_inputs(config: Config, asked: Asked) -> Inputs:
    """Raises BadInput, with what to give, for a model or data that are not there."""
    path, lengths = resolve(config.model.path), (asked.prompt_tokens, asked.answer_tokens, asked.num_prompts)
    if any(lengths) and not all(lengths):
        raise BadInput(f"{GIVE} go together: give all three, or none")
    if all(lengths):
        model = _config_alone(path, trust=config.model.trust_remote_code)
        texts = given(*lengths, config)
        source = "measured: shapes by config.json" if Path(path).is_dir() else "measured: shapes by the hub's config.json"
        return Inputs(path, model, _rank(config), texts, source)
    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise BadInput(f"model.path={config.model.path}: only a config there, no weights; give how long the rows are: {GIVE}")
    try:
        facts = inspect_model(config)
    except BadInput as error:
        hint = "" if Path(path).is_dir() else f"; to plan without it, give a folder with its config.json, and {GIVE}"
        raise BadInput(f"{error}{hint}") from error
    try:
        texts = read(config, facts.chat)
    except BadInput as error:
        raise BadInput(f"{error}; to plan without the data give {GIVE}") from error
    return Inputs(facts.path, facts.model, _rank(config), texts, "measured: shapes by config.json")


def _config_alone(path: str, *, trust: bool) -> Any:
    """Of a folder that may hold nothing else, or of a name on the hub."""
    with without_gc():
        from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f"model.path={path}: no config can be read there ({why}); give a folder with its config.json") from error
    refuse_unsupported(model, f"model.path={path}")
    return model


def _rank(config: Config) -> int:
    if not config.model.adapter:
        return 0
    file = Path(config.model.adapter).expanduser() / "adapter_config.json"
    try:
        return int(json.loads(file.read_text())["r"])
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model.adapter={config.model.adapter}: no adapter_config.json with a rank; give what peft wrote") from error
