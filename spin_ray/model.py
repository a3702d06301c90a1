"""What the driver must know of the model before the players start: its chat format, and that its parts fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.families import longest_exact, noise, reason_to_refuse, text_part
from spin_ray.hub import check_on_hub
from spin_ray.imports import without_gc
from spin_ray.lengths import Lengths
from spin_ray.records import Saved
from spin_ray.tokenizer import load_tokenizer, read_template


@dataclass(frozen=True)
class ModelFacts:
    path: str
    """Where transformers and vLLM find the model."""
    chat: ChatFormat
    adapter: str
    """Folder of the adapter that theta_0 has; empty if it has none."""
    max_positions: int | None
    """Longest sequence the model was made for, in tokens."""
    model: Any
    """transformers' config of the model."""
    longest_exact: int | None = None
    """Longest sequence that changes nothing for others in its row (families.py); None: any."""
    noise: Mapping[str, float] = field(default_factory=dict)
    """Dropout and the like that the model's config asks for, and that the learner leaves out."""
    tokenizer_line: str = ""
    """A word to the user about how the tokenizer was loaded; empty if there is none."""

    @property
    def saved(self) -> Saved:
        """Where the weights lie."""
        return Saved(self.path, self.adapter or None)


def inspect_model(config: Config) -> ModelFacts:
    """Read tokenizer and config, not the weights. Raises BadInput in one line for whatever does not fit."""
    with without_gc():
        from transformers import AutoConfig, GenerationConfig

    path, trust = resolve(config.model.path), config.model.trust_remote_code
    is_local = path.startswith(("/", ".", "~")) or path.count("/") > 1  # a hub name is NAME or OWNER/NAME
    if is_local and not Path(path).is_dir():
        raise BadInput(f"model.path={config.model.path}: no such folder; give one with a model, demo:sft, or a name on the model hub")
    if not Path(path).is_dir():
        check_on_hub(path, "model.path")
    if (Path(path) / "adapter_config.json").exists() and not (Path(path) / "config.json").exists():
        raise BadInput(f"model.path={path}: an adapter without its base; give the base as model.path, and this as model.adapter")
    adapter = str(Path(config.model.adapter).expanduser().absolute()) if config.model.adapter else ""
    if adapter and not (Path(adapter) / "adapter_config.json").exists():
        raise BadInput(f"model.adapter={config.model.adapter}: no adapter_config.json there; give the folder that peft wrote")
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model.path={path}: no model can be loaded from there: {str(error).splitlines()[0]}") from error
    try:
        generation = GenerationConfig.from_pretrained(path)
        eos_ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    except OSError:  # generation_config.json is optional
        eos_ids = []
    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise BadInput(f"model.path={path}: no *.safetensors in there; pickled weights (*.bin) may run code and are not loaded")
    refuse_unsupported(model, f"model.path={path}")
    tokenizer, line = load_tokenizer(path, trust, read_template(config.model.chat_template))
    text = text_part(model)
    chat = ChatFormat(
        tokenizer, name=f"model.path={path}", eos_ids=[i for i in eos_ids if i is not None], vocab_size=getattr(text, "vocab_size", None)
    )
    positions = getattr(text, "max_position_embeddings", None)
    return ModelFacts(path, chat, adapter, positions, model, longest_exact=longest_exact(model), noise=noise(model), tokenizer_line=line)


def refuse_unsupported(config: Any, name: str) -> None:
    """Raise BadInput for a model whose log-probs the learner would not compute exactly."""
    reason = reason_to_refuse(config)
    if reason:
        raise BadInput(f"{name}: the model {reason}; docs/models.md lists the families that can be trained")


def longest_sequence(lengths: Lengths, max_new_tokens: int, facts: ModelFacts) -> int:
    """Tokens of the longest prompt with its longest possible answer, and one; BadInput if the model is too short for it."""
    longest_prompt, longest_real = lengths.longest_prompt, lengths.longest_dialogue
    need = max(longest_real, longest_prompt + max_new_tokens) + 1
    if facts.max_positions and need > facts.max_positions:
        raise BadInput(
            f"model.path={facts.path}: the model has {facts.max_positions} positions, this run needs {need} "
            f"(longest prompt {longest_prompt}, with its real answer {longest_real}, sampler.max_new_tokens={max_new_tokens}); "
            "lower data.max_prompt_tokens, data.max_answer_tokens or sampler.max_new_tokens"
        )
    if facts.longest_exact and need > facts.longest_exact:
        raise BadInput(
            f"model.path={facts.path}: LongRoPE computes a whole packed row otherwise if one sequence has more than {facts.longest_exact} "
            f"tokens, and this run needs {need} (longest prompt {longest_prompt}, with its real answer {longest_real}, "
            f"sampler.max_new_tokens={max_new_tokens}); lower data.max_prompt_tokens, data.max_answer_tokens or sampler.max_new_tokens"
        )
    return need
