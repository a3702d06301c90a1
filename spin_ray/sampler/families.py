"""What the sampler's engine cannot do with a model, known from its config alone, before anything starts.

The facts are of vLLM 0.32, found by `spin-ray bench samplers` (docs/samplers.json). What is not listed is tried: a run's samplers take up
their own weights once when they start, and the first audit compares log-probs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

_NOT_RELOADED = {"gpt_oss": "vLLM 0.32 cannot replace a GPT-OSS model's weights in place"}
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention for CPUs was compiled for."""


def sampler_refusal(config: Any, *, on_gpus: bool, reloads: bool = True) -> str | None:
    """Why no sampler can play with a model of this transformers config, in one clause; None if nothing is known against it.

    `reloads`: whether it must take up other weights later, as in `run`, and not in `eval`.
    """
    text = config.get_text_config(decoder=True)
    if reloads and (why := _NOT_RELOADED.get(text.model_type)):
        return why
    if getattr(config, "vision_config", None) is not None and not find_spec("torchvision"):
        return f"vLLM needs torchvision for a {config.model_type} model, even for text; install the build that goes with this torch"
    return None if on_gpus else _on_a_cpu(text)


def _on_a_cpu(config: Any) -> str | None:
    if getattr(config, "kv_lora_rank", None):
        return f"vLLM's latent attention ({config.model_type}) gives wrong log-probs on a CPU"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in _CPU_HEADS:
        return f"vLLM has no attention on a CPU for heads of {size} (it has {', '.join(map(str, _CPU_HEADS))})"
    return None
