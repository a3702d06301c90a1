"""What a run starts from: the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from spin_ray.config.keys import at_least, one_of


@dataclass
class ModelConfig:
    path: str = MISSING
    """Folder of a Hugging Face model with its tokenizer, a hub name, or demo:sft / demo:base."""
    adapter: str = ""
    """Folder of a low-rank adapter of that model, as peft writes it: theta_0 is both together. Empty: none."""
    dtype: str = one_of("auto", choices=("auto", "float32", "bfloat16"))
    """Weights in sampler and learner's forward: float32, bfloat16, or auto (bfloat16 on GPUs, else float32)."""
    quantization: str = one_of("", choices=("", "nf4"))
    """nf4: the base, under an adapter, is what 4 bits per weight stand for, and the learner holds those; empty: as it is."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""
    chat_template: str = ""
    """Chat template in place of the tokenizer's: a Jinja file, or the name of a shipped one; empty: the tokenizer's own."""


@dataclass
class DataConfig:
    train: str = MISSING
    """SFT data: .jsonl, .json, .parquet, a folder saved by `datasets`, a hub data set name, or demo:train."""
    eval: str = ""
    """Held-out data in any of these forms, or demo:heldout; empty: no evaluation."""
    split: str = "train"
    """Split of data.train, where that has several: a hub data set, or a folder of one."""
    eval_split: str = ""
    """The same for data.eval; empty: as data.split."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns of a row, and keys of a message, that do not belong to the dialogue. Any that is neither known nor named here is refused."""
    turns: str = one_of("last", choices=("last", "first", "all"))
    """Which assistant turns of a dialogue become y: last, first or all. The prompt is everything before that turn."""
    max_prompts: int = at_least(0, 0)
    """Train on this many prompts, drawn with the run's seed; 0: all."""
    max_eval_prompts: int = at_least(0, 500)
    """Evaluate on this many prompts; 0: all."""
    max_prompt_tokens: int = at_least(1, 1024)
    """Longest prompt, in tokens."""
    max_answer_tokens: int = at_least(1, 1024)
    """Longest real answer, in tokens with its end-of-turn token."""
    long_rows: str = one_of("drop", choices=("drop", "refuse"))
    """Rows past these lengths: drop (and count) or refuse. A row is never cut."""
    bad_rows: str = one_of("refuse", choices=("refuse", "drop"))
    """Rows without a usable answer: refuse, or drop (and count)."""
    duplicate_rows: str = one_of("drop", choices=("drop", "keep"))
    """Rows with the prompt and the answer of an earlier row: drop (and count) or keep (and count)."""
    num_processes: int = at_least(0, 0)
    """Processes that tokenise what lies behind a source's first 30,000 rows; 0: one per core, eight at most; 1: the driver alone."""
