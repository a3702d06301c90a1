"""Random models of every family, small enough to try one in a second: what `bench samplers` and the tests of names run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 640  # the demo's tokenizer fits
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "ffn_dim": 96, "word_embed_proj_dim": 128, "ffn_hidden_size": 96,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "topk_method": "noaux_tc",
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "qk_head_dim": 128,
    "num_key_value_heads": 4, "head_dim": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama-tied": {"tie_word_embeddings": True}, "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {}, "ministral3": {}, "qwen2": {}, "qwen2-tied": {"tie_word_embeddings": True}, "qwen3": {}, "smollm3": {},
    "gemma": {}, "gemma2": {"query_pre_attn_scalar": 32}, "gemma3_text": {"query_pre_attn_scalar": 32},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}, "phi3": {}, "cohere": {}, "cohere2": {}, "granite": {}, "stablelm": {},
    "nemotron": {}, "gpt2": {}, "opt": {}, "gpt_neox": {}, "starcoder2": {}, "glm": {}, "glm4": {}, "olmo": {}, "olmo2": {}, "olmo3": {},
    "exaone4": {}, "ernie4_5": {}, "hunyuan_v1_dense": {}, "apertus": {}, "helium": {}, "seed_oss": {}, "arcee": {}, "bloom": {},
    "gpt_bigcode": {}, "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2},
    "mixtral": _EXPERTS, "qwen2_moe": _EXPERTS, "qwen3_moe": {**_EXPERTS, "shared_expert_intermediate_size": 0},
    "olmoe": _EXPERTS, "granitemoe": _EXPERTS, "phimoe": _EXPERTS,
    "ernie4_5_moe": _EXPERTS, "hunyuan_v1_moe": {**_EXPERTS, "moe_topk": 2}, "dots1": {**_EXPERTS, "scoring_func": "sigmoid"},
    "glm4_moe": {**_EXPERTS, "head_dim": 32},
    "deepseek_v2": {**_EXPERTS, **_LATENT, "topk_method": "greedy"}, "deepseek_v3": {**_EXPERTS, **_LATENT, "scoring_func": "sigmoid"},
    "minimax_m2": _EXPERTS, "gpt_oss": _EXPERTS,
    "flex_olmo": _EXPERTS, "lfm2": {"layer_types": ["conv", "full_attention"]},
}
COMPOSITE = {"gemma3": "gemma3_text", "mistral3": "ministral3", "qwen2_5_vl": "qwen2_5_vl_text", "qwen2_vl": "qwen2_vl_text"}


def tiny_config(family: str) -> Any:
    """The family's transformers config with every size small. `family` is its model_type, a dash and a variant after it."""
    from transformers import AutoConfig

    model_type, own = family.split("-")[0], FAMILIES.get(family, {})
    if model_type in COMPOSITE:
        return _composite(model_type)
    known = set(AutoConfig.for_model(model_type).to_dict()) | set(own)
    names = {*known, *getattr(AutoConfig.for_model(model_type), "attribute_map", {})}
    return AutoConfig.for_model(model_type, **{name: value for name, value in (_COMMON | own).items() if name in names})


def _composite(model_type: str) -> Any:
    from transformers import AutoConfig

    text = {**_COMMON, "query_pre_attn_scalar": 32, "rope_parameters": None}
    if model_type.startswith("qwen"):
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
        vision = {
            "depth": 1, "embed_dim": 32, "hidden_size": 128 if model_type == "qwen2_vl" else 32, "num_heads": 2, "intermediate_size": 48,
            "out_hidden_size": 128, "patch_size": 14, "fullatt_block_indexes": [0],
        }
        return AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }
    if model_type == "gemma3":
        return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, mm_tokens_per_image=4)
    pixtral = {**vision, "model_type": "pixtral", "head_dim": 16}
    return AutoConfig.for_model(model_type, text_config={**text, "model_type": "mistral"}, vision_config=pixtral, image_token_index=10)


def save_tiny(family: str, folder: Path, *, seed: int = 0) -> None:
    """A random model of the family as transformers saves it, buffers too, with weights large enough that its answers are not uniform."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = tiny_config(family)
    auto = AutoModelForImageTextToText if family in COMPOSITE else AutoModelForCausalLM
    lm = auto.from_config(config, dtype=torch.float32)
    perturb(lm, 0.1)
    lm.save_pretrained(folder)


def perturb(lm: Any, size: float, *, seed: int = 1) -> None:
    """Add noise to all parameters and to the persistent buffers that a router adds to its scores."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in lm.named_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))
        for name, buffer in lm.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():
                buffer.add_(size * torch.randn(buffer.shape, generator=noise))
