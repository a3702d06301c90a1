"""A version of the model as lm-evaluation-harness knows models: texts in, log-likelihoods and texts out.

Token ids, special tokens, windows and cuts are those of the harness' own Hugging Face back end (`HFLM`), so the numbers are too.
Nothing that is encoded here is trained on: dialogues go through chat.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from spin_ray.chat import ChatFormat
from spin_ray.errors import BadInput
from spin_ray.records import Likelihood, SamplingSettings
from spin_ray.tasks.asking import Answers

UNLIMITED = 2**31
DEFAULT_ANSWER_TOKENS = 256
"""Longest answer where a task does not say, as in HFLM."""
UNDERSTOOD = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample", "temperature", "top_p"}
"""What a task may say of how an answer is drawn."""
Pair = tuple[list[int], list[int]]


class SamplerModel(TemplateLM):
    """Answers the harness. `max_length`: tokens that the model may read, [1, max_length] -> the next one; `answers`: who computes."""

    def __init__(self, chat: ChatFormat, max_length: int = UNLIMITED, answers: Answers | None = None):
        super().__init__()
        self.tokenizer, self._chat, self.max_length, self._answers = chat.tokenizer, chat, max_length, answers
        self.num_truncated = 0
        """Requests that were longer: they have lost their begin."""
        self.num_windowed = 0
        """Texts that were longer: they were read in windows."""

    # Tokens.

    @property
    def eot_token_id(self) -> int:
        own = self.tokenizer.eos_token_id
        return self._chat.end_id if own is None else own

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else own

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids with the tokenizer's own special tokens, but for a text that begins with them (a chat template's)."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **given)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def _pair(self, context: str, continuation: str) -> Pair:
        """Ids of a text and of its continuation. Raises BadInput for one without tokens."""
        if context:
            ids = self._encode_pair(context, continuation)
        else:
            given = self.tok_encode(continuation, add_special_tokens=False)
            ids = (given[:1], given[1:]) if given[:1] == [self.prefix_token_id] else ([self.prefix_token_id], given)
        if not all(ids):
            raise BadInput(f"the continuation {continuation!r} of {context[-40:]!r} has no token of its own")
        return ids

    def _windows(self, text: str) -> list[Pair]:
        """A whole text, every token of it predicted once."""
        given = {"max_seq_len": self.max_length, "context_len": 1, "prefix_token": self.prefix_token_id}
        return list(map(make_disjoint_window, get_rolling_token_windows(token_list=self.tok_encode(text), **given)))

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) or [self.prefix_token_id]

    def lengths(self, instance: Instance) -> tuple[int, int]:
        """Tokens that the model must be able to read, so that nothing of a request is cut off; and so that its answer fits in, with a token
        before it. Raises BadInput for a request that makes no sense.
        """
        match instance.request_type:
            case "generate_until":
                context, kwargs = instance.args
                answer = self._settings(kwargs).max_new_tokens
                return len(self._prompt(context)) + answer, answer + 1
            case "loglikelihood_rolling":
                return len(self.tok_encode(*instance.args)), 1
            case _:
                context, continuation = self._pair(*instance.args)
                return len(context) + len(continuation) - 1, len(continuation)

    # Requests.

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return _tuples(self._answers.likelihood(self._fitted(*self._pair(*request.args)) for request in requests))

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        return _tuples(self._answers.likelihood(self._fitted(context, continuation) for _, context, continuation in requests))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        counts: list[int] = []
        found = iter(self._answers.likelihood(itertools.chain.from_iterable(self._counted(requests, counts))))
        return [sum(each.logp for each in itertools.islice(found, count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = []
        for _, group in itertools.groupby(requests, key=lambda request: repr(request.args[1])):  # of one task, all alike
            alike = list(group)
            settings = self._settings(alike[0].args[1])
            prompts = (self._room_for_answer(self._prompt(request.args[0]), settings) for request in alike)
            drawn = self._answers.sample(prompts, settings)
            texts += [self._text(completion.token_ids, settings) for completion in drawn]
        return texts

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Cut the context from the left, so that all but the last token can be read."""
        room = self.max_length + 1 - len(continuation)
        self.num_truncated += len(context) > room
        return np.array(context[-room:], np.int32), np.array(continuation, np.int32)

    def _counted(self, requests: Sequence[Instance], counts: list[int]) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        for request in requests:
            windows = self._windows(*request.args)
            counts.append(len(windows))
            self.num_windowed += len(windows) > 1
            yield [self._fitted(*window) for window in windows]

    def _room_for_answer(self, prompt: list[int], settings: SamplingSettings) -> np.ndarray:
        room = self.max_length - settings.max_new_tokens
        self.num_truncated += len(prompt) > room
        return np.array(prompt[-room:], np.int32)

    def _settings(self, kwargs: dict[str, Any]) -> SamplingSettings:
        """How a task wants its answers drawn. Raises BadInput for what the samplers do not do."""
        if unknown := sorted(set(kwargs) - UNDERSTOOD):
            raise BadInput(f"generation_kwargs has {', '.join(unknown)}; the samplers take {', '.join(sorted(UNDERSTOOD))}")
        given = normalize_gen_kwargs(kwargs, DEFAULT_ANSWER_TOKENS)
        until = tuple(text for text in given["until"] if text)
        return SamplingSettings(
            float(given.get("temperature", 0.0)), float(given.get("top_p", 1.0)), given["max_gen_toks"], tuple(sorted(self._chat.eos_ids)),
            until,
        )

    def _text(self, token_ids: np.ndarray, settings: SamplingSettings) -> str:
        """An answer's text up to what ends it."""
        ends = [*settings.stop_texts, self.tokenizer.decode([self.eot_token_id])]
        return postprocess_generated_text(self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True), ends, None)


def _tuples(found: Sequence[Likelihood]) -> list[tuple[float, bool]]:
    return [(each.logp, each.greedy) for each in found]
