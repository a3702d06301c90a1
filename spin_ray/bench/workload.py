"""What a bench of the learner works on: a model with random weights and pairs with long-tailed lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spin_ray.records import PAIR_SCHEMA, Pair, from_table, to_table

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**_LLAMA, "vocab_size": 503, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "small": {**_LLAMA, "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "mid": {**_LLAMA, "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": True},
    "smollm2": {**_LLAMA, "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "0.3b": {**_LLAMA, "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18,
             "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "qwen3-0.6b": {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
                   "tie_word_embeddings": True},
    "llama-3.2-1b": {**_LLAMA, "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072,
                     "tie_word_embeddings": True},
    "zephyr-7b": {"model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
                  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
                  "sliding_window": None, "tie_word_embeddings": False},
}
"""Hugging Face config of each model by name; "small" has 12.7M parameters, "mid" 54M, "smollm2" 135M, "0.3b" 264M, the others are the
published models' shapes."""

_SPECIAL = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Lengths:
    """Answer and prompt lengths: log-normal, cut off at `longest`. The defaults average 52 and 89 tokens."""

    prompt_median: float = 38.0
    answer_median: float = 65.0
    sigma: float = 0.8
    longest: int = 512


def save_model(folder: Path, shape: str, *, seed: int = 0, weights: bool = True, **changes: Any) -> None:
    """Write a model with random weights and a stand-in tokenizer; float32, or bfloat16 from 100M parameters on. Without `weights` its
    config alone.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    settings = {**SHAPES[shape], "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if not weights:
        config.save_pretrained(folder)
        return
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if config.hidden_size >= 1024 else torch.float32
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    vocabulary = Tokenizer(WordLevel({word: k for k, word in enumerate(_SPECIAL)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


ADAPTER = "adapter"
"""Its folder beside the model's."""


def save_adapter(folder: Path, *, rank: int, seed: int = 0) -> None:
    """Write an adapter that changes nothing yet of the model in `folder`/model."""
    from spin_ray.config import LoraConfig
    from spin_ray.theta import new_adapter_of

    new_adapter_of(str(folder / "model"), LoraConfig(rank=rank), seed=seed).write(folder / ADAPTER)


def random_pairs(count: int, *, vocab_size: int, lengths: Lengths = Lengths(), seed: int = 0) -> list[Pair]:
    """Pairs of random tokens, with zeros for references."""
    rng = np.random.default_rng(seed)
    pairs = []
    for k in range(count):
        drawn = np.array([lengths.prompt_median, lengths.answer_median, lengths.answer_median]) * rng.lognormal(0, lengths.sigma, 3)
        sizes = np.clip(drawn, 4, lengths.longest).astype(int)
        ids = [rng.integers(len(_SPECIAL), vocab_size, size).astype(np.int32) for size in sizes]
        pairs.append(Pair(k, 0, 0, 0, *ids, *[np.zeros(size, np.float32) for size in sizes[1:]], "stop"))
    return pairs


def with_references(pairs: Sequence[Pair], model_path: Path, *, device: str) -> list[Pair]:
    """The pairs with the log-probs that the model in `model_path` gives their answers: what the sampler hands to the learner."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").to(device)

    @torch.no_grad()
    def score(prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64)).to(device)
        hidden = model.base_model(ids[None, :-1]).last_hidden_state[0, len(prompt) - 1 :]
        logps = torch.log_softmax(model.lm_head(hidden).float(), -1)
        return logps.gather(1, ids[len(prompt) :, None])[:, 0].cpu().numpy()

    return [
        replace(pair, opponent_real_logps=score(pair.prompt_ids, pair.real_ids),
                opponent_generated_logps=score(pair.prompt_ids, pair.generated_ids))
        for pair in pairs
    ]


def save_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    pq.write_table(to_table(pairs, PAIR_SCHEMA), path)


def load_pairs(path: Path) -> list[Pair]:
    with pq.ParquetFile(path) as file:
        return from_table(file.read(use_threads=False), Pair)
