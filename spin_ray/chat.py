"""The one place that turns messages into token ids.

Sampling and training share what is made here: the sampler gets `prompt_ids`, the learner trains on exactly those ids
followed by the answer's. Nothing is decoded and encoded again on the way (invariant 1 of ARCHITECTURE.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin_ray.errors import BadInput

Message = dict[str, str]
_PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class ChatFormat:
    """A tokenizer's chat template and the tokens that end an answer.

    `end_id` is the token with which the template closes an assistant turn (or the tokenizer's EOS where the template
    closes it with none); `stop_ids` adds every other token on which the sampler must stop.
    Raises BadInput if there is no template, no end token, or the template cannot be continued from its own prompt.
    """

    def __init__(self, tokenizer: Any, *, name: str = "tokenizer", eos_ids: Sequence[int] = ()):
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput(f"{name}: the tokenizer has no chat template; add chat_template to its tokenizer_config.json")
        self._tokenizer = tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(eos_ids)
        if tokenizer.eos_token_id is not None:
            special.add(tokenizer.eos_token_id)
        try:
            _, suffix = self._render(_PROBE[:1], "b")
        except ValueError as error:
            raise BadInput(f"{name}: the chat template cannot be used: {error}") from error
        closing = [i for i in suffix if i in special]
        if not closing and tokenizer.eos_token_id is None:
            raise BadInput(f"{name}: neither the chat template nor the tokenizer has a token that ends an answer")
        self._closes = bool(closing)
        self.end_id: int = closing[0] if closing else tokenizer.eos_token_id
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids: frozenset[int] = frozenset([self.end_id, *eos, *eos_ids])

    def encode(self, prompt: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a dialogue up to the generation prompt, and of the answer with its end-of-turn token.

        The answer's ids hold the end token exactly once, at their end.
        Raises ValueError if the template rejects the roles, or the answer itself contains an end token.
        """
        prompt_ids, suffix = self._render(prompt, answer)
        ends = [k for k, token in enumerate(suffix) if token in self.stop_ids]
        if len(ends) > self._closes:
            raise ValueError(f"the answer contains the end-of-turn token {self._tokenizer.convert_ids_to_tokens(self.end_id)}")
        return prompt_ids, suffix[: ends[0] + 1] if ends else [*suffix, self.end_id]

    def decode(self, answer_ids: Sequence[int]) -> str:
        """The text of an answer, for people and for exact match; never fed back to a model."""
        return self._tokenizer.decode([int(i) for i in answer_ids], skip_special_tokens=True)

    def _render(self, prompt: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and ids of all that the template puts after it for this answer."""
        full = [*prompt, {"role": "assistant", "content": answer}]
        try:
            prompt_text = self._tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
            full_text = self._tokenizer.apply_chat_template(full, tokenize=False)
        except Exception as error:  # a template is a program of its own, run in transformers' sandbox; it may fail in any way
            roles = ", ".join(message["role"] for message in full)
            raise ValueError(f"the chat template rejects the roles {roles}: {' '.join(str(error).split())}") from error
        if not full_text.startswith(prompt_text):
            raise ValueError("the chat template's generation prompt is not how it begins an assistant turn")
        prompt_ids, full_ids = self._ids(prompt_text), self._ids(full_text)
        if full_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, full_ids[len(prompt_ids) :]
        # A token spans the border: encode the answer alone, as the sampler also starts on a fresh token there.
        return prompt_ids, self._ids(full_text[len(prompt_text) :])

    def _ids(self, text: str) -> list[int]:
        text.encode()  # half a surrogate pair, which JSON can hold and Unicode cannot, is a ValueError of the row
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]
