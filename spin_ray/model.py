"""What the driver must know of the model before the players start: its chat format, and that its parts fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.imports import without_gc
from spin_ray.records import Prompt

_CHANGES_LOGITS = (
    "final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
)


@dataclass(frozen=True)
class ModelFacts:
    path: str
    """Where transformers and vLLM find the model."""
    chat: ChatFormat
    max_positions: int | None
    """Longest sequence the model was made for, in tokens."""


def inspect_model(config: Config) -> ModelFacts:
    """Read tokenizer and config, not the weights. Raises BadInput in one line for whatever does not fit."""
    with without_gc():
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    path, trust = resolve(config.model.path), config.model.trust_remote_code
    if config.model.path.startswith(("/", ".", "~", "demo:")) and not Path(path).is_dir():
        raise BadInput(f"model.path={config.model.path}: no such folder; give one with a model, demo:sft, or a name on the model hub")
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model.path={path}: no model with a tokenizer can be loaded from there: {str(error).splitlines()[0]}") from error
    try:
        generation = GenerationConfig.from_pretrained(path)
        eos_ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    except OSError:  # generation_config.json is optional
        eos_ids = []
    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise BadInput(f"model.path={path}: no *.safetensors in there; pickled weights (*.bin) may run code and are not loaded")
    if len(tokenizer) > model.vocab_size:
        raise BadInput(f"model.path={path}: the tokenizer knows {len(tokenizer)} tokens, the model only {model.vocab_size}")
    refuse_unsupported(model, f"model.path={path}")
    chat = ChatFormat(tokenizer, name=f"model.path={path}", eos_ids=[i for i in eos_ids if i is not None])
    return ModelFacts(path, chat, getattr(model, "max_position_embeddings", None))


def refuse_unsupported(config: Any, name: str) -> None:
    """Raise BadInput for a model whose logits are not its output layer's product alone."""
    for key in _CHANGES_LOGITS:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise BadInput(f"{name}: models with {key} (here {getattr(config, key)}) are not supported by the learner yet")


def longest_sequence(prompts: Sequence[Prompt], max_new_tokens: int, facts: ModelFacts) -> int:
    """Tokens of the longest prompt with its longest possible answer, and one; BadInput if the model is too short for it."""
    longest_prompt = max(len(prompt.prompt_ids) for prompt in prompts)
    longest_real = max(len(prompt.prompt_ids) + len(prompt.real_ids) for prompt in prompts)
    need = max(longest_real, longest_prompt + max_new_tokens) + 1
    if facts.max_positions and need > facts.max_positions:
        raise BadInput(
            f"model.path={facts.path}: the model has {facts.max_positions} positions, this run needs {need} "
            f"(longest prompt {longest_prompt}, with its real answer {longest_real}, sampler.max_new_tokens={max_new_tokens}); "
            "lower data.max_prompt_tokens, data.max_answer_tokens or sampler.max_new_tokens"
        )
    return need
