"""Which model families the learner computes exactly, from the config alone; what the driver refuses before Ray starts.

Families that are not in the table are refused: packing makes an unknown one silently wrong. Each one in it was compared with
transformers, log-probs and all gradients, by `spin-ray bench models`, which writes docs/models.md. The model is always
transformers' own code: a folder's code may make its tokenizer (`model.trust_remote_code`), never its log-probs.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What the learner must know of a family beyond what its layers tell transformers' attention interface."""

    factor: str = ""
    """Config key of a number that multiplies the logits."""
    divisor: str = ""
    """Config key of a number that divides the logits, or the hidden states before the output layer."""
    causal_only: bool = False
    """Whether its config can ask for attention in both directions; "vision" asks for it within pictures only."""
    hides_window: bool = False
    """Whether its layers do not tell their attention of the sliding window that transformers puts into its mask."""


_PLAIN = Family()
_GRANITE = Family(divisor="logits_scaling")
_COHERE = Family(factor="logit_scale")
_CAUSAL = Family(causal_only=True)
FAMILIES: Mapping[str, Family] = {
    # dense, with nothing to know
    **dict.fromkeys((
        "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "vaultgemma", "nanochat",
        "exaone4", "glm", "glm4", "olmo", "olmo2", "olmo3", "smollm3", "gpt_neox", "gpt2", "gpt_bigcode", "opt", "biogpt", "ctrl",
        "starcoder2",
        "hunyuan_v1_dense", "ernie4_5", "stablelm", "nemotron", "persimmon", "seed_oss", "arcee", "apertus", "helium", "jais2", "cwm",
        "bitnet", "diffllama",
    ), _PLAIN),
    # mixtures of experts
    **dict.fromkeys((
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1",
        "ernie4_5_moe", "exaone_moe", "gpt_oss", "hunyuan_v1_moe", "hy_v3", "minimax_m2", "mimo_v2_flash", "mellum", "laguna",
        "solar_open", "axk1", "afmoe", "aria_text", "jetmoe", "longcat_flash",
    ), _PLAIN),
    "phimoe": Family(hides_window=True),
    # what happens to the logits
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "minicpm3"), _GRANITE),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), _COHERE),
    "hyperclovax": Family(factor="logits_scaling"),
    "gemma3_text": _CAUSAL, "gemma4_text": _CAUSAL, "gemma4_unified_text": _CAUSAL,
    # text parts of composite models
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"), _PLAIN),
}
"""By `model_type` of the text part."""
COMPOSITES = ("gemma3", "gemma4", "gemma4_unified", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Whose text part is trained while the rest stays as it is."""

_OWN_ATTENTION = (
    "bloom", "falcon", "mpt", "gptj", "codegen", "gpt_neo", "gpt_neox_japanese", "openai-gpt", "xglm", "cpmant", "big_bird", "xlm", "xlnet",
    "reformer", "git", "mllama", "blt",
)
_STATE = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "rwkv",
    "xlstm", "zamba", "zamba2", "zaya",
)
_MASKS = {
    "doge": "a mask of its own", "inkling_text": "a position bias", "llama4": "attention in chunks", "llama4_text": "attention in chunks",
    "deepseek_v4": "compressed keys", "deepseek_v32": "sparse attention", "glm_moe_dsa": "sparse attention", "hy_v4": "sparse attention",
    "axk2": "sparse attention", "minimax_m3_vl_text": "sparse attention",
}
_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention"})


def text_part(config: Any) -> Any:
    """The config of the language model: of a composite one, such as Gemma 3's or Mistral 3's, its text part."""
    return config.get_text_config()


def reason_to_refuse(config: Any) -> str | None:
    """Why the learner would not compute this model exactly, in words that begin after "the model"; None if it does."""
    return next(_reasons(config), None)


def _reasons(config: Any) -> Iterator[str]:
    text = text_part(config)
    name, family = text.model_type, FAMILIES.get(text.model_type)
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        yield "is quantised (quantization_config), and quantised weights cannot be trained; give the folder that it was made from"
    if name in _STATE:
        yield f"is of the family {name}, whose layers keep a state (recurrence, convolution): answers in one row would see each other"
    if name in _OWN_ATTENTION:
        yield f"is of the family {name}, whose attention cannot be chosen in transformers: answers in one row would see each other"
    if name in _MASKS:
        yield f"is of the family {name} with {_MASKS[name]}, which packed attention does not know"
    if family is None:
        yield f"is of the family {name}, which was not found to be computed exactly"
    if text is not config and config.model_type not in COMPOSITES:
        yield f"is of the composite family {config.model_type}, whose text part cannot be taken out"
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in _ATTENTION_KINDS:
            yield f"has layers of the kind {kind}, which packed attention does not know"
    if family and family.causal_only and getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        yield f"has use_bidirectional_attention={text.use_bidirectional_attention}: only causal attention can be packed"
    window = getattr(text, "sliding_window", None)
    if family and family.hides_window and window and window < text.max_position_embeddings:
        yield f"has sliding_window={window}, of which the layers of the family {name} do not tell their attention"
    if config.model_type == "gemma3" and getattr(text, "final_logit_softcapping", None):
        yield "has final_logit_softcapping, which transformers does not heed in models of the family gemma3"


def layers_with_attention(config: Any) -> int:
    """How many modules attend in a forward pass at least."""
    return text_part(config).num_hidden_layers


def final_scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What happens to the output layer's product: times the scale, then cap × tanh(· / cap); no cap: None."""
    text = text_part(config)
    family, scale = FAMILIES.get(text.model_type, _PLAIN), 1.0
    if family.factor:
        scale *= getattr(text, family.factor)
    if family.divisor:
        scale /= getattr(text, family.divisor)
    return float(scale), getattr(text, "final_logit_softcapping", None)


def longest_exact(config: Any) -> int | None:
    """Tokens from which on a sequence changes how others in its row are computed, so that none may be longer; None: no such number.

    LongRoPE takes its other factors for the whole row as soon as one position in it lies beyond the original length.
    """
    rope = getattr(text_part(config), "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((length for length in lengths if length), default=None)


def noise(config: Any) -> dict[str, float]:
    """Config keys that ask for noise while training, with their values: the learner leaves it out (learner/modes.py)."""
    found = {}
    for key, value in text_part(config).to_dict().items():
        asks = ("drop" in key or "jitter" in key) and not key.startswith(("classifier", "summary"))
        if asks and isinstance(value, float) and value > 0:
            found[key] = value
    return found


def auto_class(config: Any) -> Any:
    """transformers' Auto class that loads the whole model of this config: composite ones are no causal LMs to it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if known else AutoModelForImageTextToText
