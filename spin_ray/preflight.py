"""The proof at the door: spin_ray shows, on the user's own first rows, that it sees what the user's model and template mean.

| what | where, when | by |
|---|---|---|
| tokens | the driver, before Ray starts | `tokens`: chat.py's rules, derived again on the first rows |
| end | the driver, before Ray starts | ending.py: config and tokenizer can be saved and loaded, tensors keep names and shapes |
| model | the learner's workers, before the first step | learner/proof.py: a packed row against plain transformers |
| sampler | after every weight sync | exchange/audit.py; `eval`, which has no learner, compares with plain transformers |

What fails is one line of `BadInput`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.data import first_rows
from spin_ray.ending import check_end
from spin_ray.errors import BadInput
from spin_ray.model import ModelFacts
from spin_ray.placement import Hardware
from spin_ray.records import Pair, Prompt, real_only
from spin_ray.sampler.families import sampler_refusal
from spin_ray.tokenizer import read_template
from spin_ray.tokenproof import prove_tokens

FIRST_ROWS = 64
"""Of these the proof takes its examples."""
NUM_PAIRS = 4
MAX_TOKENS = 1024
"""Of a packed row, as long as that leaves two pairs: the proof must not cost more than seconds."""


class Proof:
    """What has been shown so far, in words, and the seconds that it took."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._seconds = 0.0

    def tokens(self, source: str, split: str, config: Config, chat: ChatFormat) -> None:
        """Raises BadInput for a row among the first that does not survive its tokens."""
        with self._timed():
            preferences = config.method == "dpo" and source == config.data.train
            rows = first_rows(source, config.data, split, FIRST_ROWS, preferences=preferences)
            self._shown.append(prove_tokens(chat, rows, source).line)

    def end(self, config: Config, facts: ModelFacts, say: Callable[[str], None]) -> None:
        """Raises BadInput for a model that could not be saved. `say` gets what the user should know of an export."""
        model = config.model
        with self._timed():
            notes = check_end(facts.path, trust_remote_code=model.trust_remote_code, chat_template=read_template(model.chat_template))
            self._shown.append("end: config, tokenizer and tensor names can be saved")
        for note in filter(None, [facts.tokenizer_line, _about_noise(facts), *notes]):
            say(note)

    def line(self, shown: str = "", seconds: float = 0.0) -> str:
        """The one line for the user, with what was shown elsewhere, such as in the learner."""
        return f"the proof at the door holds ({self._seconds + seconds:.1f} s): {'; '.join([*self._shown, *filter(None, [shown])])}"

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begun


def _about_noise(facts: ModelFacts) -> str:
    noise = ", ".join(f"{key}={value:g}" for key, value in facts.noise.items())
    return f"{facts.path}: {noise} of its config is left out, in training as in scoring: noise would move the log-probs" if noise else ""


def refuse_sampler(facts: ModelFacts, hardware: Hardware, *, reloads: bool = True) -> None:
    """Raise BadInput for a model that vLLM is known not to play with on this hardware."""
    if why := sampler_refusal(facts.model, on_gpus=hardware.sampler_gpus > 0, reloads=reloads):
        raise BadInput(f"model.path={facts.path}: {why}; docs/models.md has the models that can be sampled from")


def proof_pairs(prompts: Sequence[Prompt]) -> tuple[Pair, ...]:
    """Different pairs for one packed row: of the first prompts the longest that fit, each with the next one's real answer for y'.

    Long rows, because a window or a position past some limit shows in no short one. Always two, if there are two prompts.
    """
    longest_first = sorted(prompts[:FIRST_ROWS], key=lambda prompt: (-_length(prompt), prompt.prompt_id))
    chosen: list[Prompt] = []
    room = MAX_TOKENS
    for prompt in longest_first:
        if len(chosen) < NUM_PAIRS and 2 * _length(prompt) <= room:
            chosen.append(prompt)
            room -= 2 * _length(prompt)
    if len(chosen) < 2:
        chosen = longest_first[-2:]
    others = itertools.islice(itertools.cycle(chosen), 1, None)
    return tuple(_pair(prompt, other.real_ids) for prompt, other in zip(chosen, others, strict=False))


def _length(prompt: Prompt) -> int:
    return len(prompt.prompt_ids) + len(prompt.real_ids)


def _pair(prompt: Prompt, other_answer: np.ndarray) -> Pair:
    return dataclasses.replace(
        real_only(prompt, 0), generated_ids=other_answer, opponent_generated_logps=np.zeros(len(other_answer), np.float32)
    )
