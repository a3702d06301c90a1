"""Tiny random models of any causal-LM family that transformers knows, with nothing in them that is trivially zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spin_ray.families import COMPOSITES, auto_class
from spin_ray.records import Pair

LAYERS, HIDDEN, VOCABULARY, WINDOW = 4, 32, 96, 6
NUMBERS = {
    # sizes
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "sliding_window": WINDOW,
    "use_sliding_window": True, "max_window_layers": 2,
    "n_positions": 128, "n_inner": 48, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "decoder_layers": LAYERS, "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "d_model": HIDDEN, "dff": 48,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_topk": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "moe_num_shared_experts": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1, "num_dense_layers": 1,
    # latent attention; its rotary part is what "head_dim" means there
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8, "v_head_dim": 8,
    # what changes log-probs, with values at which forgetting it shows
    "logits_scaling": 1.7, "logit_scale": 0.4, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 1.0, "embedding_multiplier": 1.3,
    "residual_multiplier": 0.8, "attention_multiplier": 0.4, "query_pre_attn_scalar": 5,
    # noise, which must not be there
    "attention_dropout": 0.2, "hidden_dropout": 0.2, "dropout": 0.2, "activation_dropout": 0.2, "layerdrop": 0.2, "attn_pdrop": 0.2,
    "resid_pdrop": 0.2, "embd_pdrop": 0.2, "residual_dropout": 0.2, "embedding_dropout": 0.2, "router_jitter_noise": 0.2,
    "input_jitter_noise": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
"""Set where a family's config has the key."""
_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_NO_HEAD_DIM = {"head_dim": None}
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "glm4_moe_lite": _LATENT, "axk1": _LATENT, "axk2": _LATENT, "youtu": _LATENT,
    "minicpm3": _LATENT, "longcat_flash": _LATENT, "glm_moe_dsa": _LATENT, "deepseek_v32": _LATENT, "kimi_linear": _LATENT,
    "phimoe": {"sliding_window": None},
    "stablelm": {"qk_layernorm": True, "use_parallel_residual": True}, "phi": {"qk_layernorm": True},
    "diffllama": {"attention_dropout": None},
    "gemma4": {"vocab_size_per_layer_input": VOCABULARY}, "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY},
}
"""What single families need besides; None leaves a number to the family."""
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
TEXT_PARTS: dict[str, dict[str, Any]] = {
    "gemma3": {"final_logit_softcapping": None}, "qwen2_vl": _MROPE, "qwen2_5_vl": _MROPE, "qwen3_vl": _MROPE, "qwen3_vl_moe": _MROPE,
}
"""What the text parts of single composite families need besides."""
_VISION = {"depth": 1, "embed_dim": HIDDEN, "num_heads": 2, "out_hidden_size": HIDDEN}
_SEES = {
    "qwen2_vl": _VISION, "qwen2_5_vl": {**_VISION, "fullatt_block_indexes": [0]},
    "qwen3_vl": {**_VISION, "deepstack_visual_indexes": [0]}, "qwen3_vl_moe": {**_VISION, "deepstack_visual_indexes": [0]},
}
_ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {**_ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_parameters": {**_ROPE, "rope_type": "yarn"}}, {"rope_parameters": {**_ROPE, "rope_type": "linear"}},
    ],
    "stablelm": [{"use_parallel_residual": False, "use_qkv_bias": True}],
    "gpt_neox": [{"use_parallel_residual": False}],
    "phi": [{"qk_layernorm": False}],
    "qwen2": [{"use_sliding_window": False}],
    "opt": [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 16}],
    "gpt2": [{"scale_attn_by_inverse_layer_idx": True}],
    "exaone4": [{"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}],
    "olmo": [{"clip_qkv": 0.5}], "olmoe": [{"clip_qkv": 0.5}],
}
"""Options that change how a family computes, each a model of its own."""


def families() -> list[str]:
    """Every model_type that AutoModelForCausalLM takes, and the composite ones whose text part is trained."""
    return list(dict.fromkeys((*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *COMPOSITES)))


def tiny_config(model_type: str, **options: Any) -> Any:
    """A config of a few thousand parameters, with the family's own defaults for all that does not matter here."""
    default = AutoConfig.for_model(model_type)
    wanted = _numbers(default)
    if "text_config" in default.sub_configs:
        wanted["text_config"] = _present(_numbers(default.text_config) | TEXT_PARTS.get(model_type, {}))
    for name in ("vision_config", "audio_config"):
        if name in default.sub_configs and getattr(default, name, None) is not None:
            wanted[name] = {k: v for k, v in _numbers(getattr(default, name)).items() if k != "layer_types"} | _SEES.get(model_type, {})
    return AutoConfig.for_model(model_type, **{**wanted, **options})


def variants(model_type: str) -> list[dict[str, Any]]:
    """Options of the family's models to compare: as it is, with tied and untied weights exchanged, and its own."""
    default = AutoConfig.for_model(model_type)
    tied = getattr(default, "tie_word_embeddings", None)
    return [{}, *([] if tied is None else [{"tie_word_embeddings": not tied}]), *VARIANTS.get(model_type, [])]


def _numbers(default: Any) -> dict[str, Any]:
    keys = {*default.to_dict(), *default.attribute_map}
    wanted = {key: value for key, value in NUMBERS.items() if key in keys}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if kinds and "layer_types" in default.to_dict():
        wanted["layer_types"] = [kinds[k % len(kinds)] for k in range(LAYERS)]
    wanted |= OVERRIDES.get(default.model_type, {})
    return _present(wanted)


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def tiny_model(config: Any, *, seed: int = 0) -> Any:
    """A float32 model with noise on every parameter and every persistent buffer: norms, biases, sinks and corrections too."""
    torch.manual_seed(seed)
    lm = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    persistent = set(lm.state_dict())
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(_noise(parameter))
        for name, buffer in lm.named_buffers():
            if name in persistent and buffer.is_floating_point():
                buffer.add_(_noise(buffer))
    return lm


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    spread = 0.3 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
    return spread * torch.randn(tensor.shape)


def pair(prompt: int, real: int, generated: int, *, alike: int = 0) -> Pair:
    """Random ids; lengths of the three, and how many tokens y' begins with as y does."""
    rng = np.random.default_rng([prompt, real, generated, alike])
    ids = [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in (prompt, real, generated)]
    ids[2][:alike] = ids[1][:alike]
    return Pair(0, 0, 0, 0, *ids, np.zeros(real, np.float32), np.zeros(generated, np.float32), "stop")


PAIRS = [pair(5, 9, 12), pair(2, 1, 1), pair(3, 14, 4, alike=3), pair(9, 3, 8), pair(4, 6, 6, alike=6)]
"""Answers longer than a window and shorter, with common beginnings of all kinds."""
