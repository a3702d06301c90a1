"""A model that answers a dialogue, token by token, by transformers' own `generate`. Text that it writes is data: it is made printable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from spin_ray.chat import ChatFormat
from spin_ray.errors import BadInput
from spin_ray.learner.loading import load_to_generate
from spin_ray.look.printable import printable
from spin_ray.look.versions import Chosen
from spin_ray.model import inspect_model
from spin_ray.rendering import Message

Hear = Callable[[str], None]
"""Gets what is new of an answer."""


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float
    """0: greedy."""
    seed: int | None = None
    """The same dialogue gets the same answer; None: another one each time."""


@dataclass
class Talker:
    """One model and its side of the dialogue."""

    name: str
    lm: Any
    chat: ChatFormat
    max_positions: int | None
    history: list[Message] = field(default_factory=list)
    """Without the system text."""

    def answer(self, text: str, system: str, drawing: Drawing, hear: Hear) -> str:
        """Answer the user's text and remember both. KeyboardInterrupt ends the answer, and what there is of it counts.

        Raises BadInput for a dialogue that the template or the model does not take; then nothing is remembered.
        """
        asked = [*self.history, {"role": "user", "content": text}]
        stream = _Stream(self.chat, hear)
        try:
            self._generate(self._prompt(asked, system), drawing, stream)
        finally:
            stream.end()
            if stream.begun:
                answered = [{"role": "assistant", "content": stream.text}] if stream.text.strip() else []
                self.history = [*asked, *answered] if answered else self.history
        return printable(stream.text)

    def _prompt(self, messages: Sequence[Message], system: str) -> list[int]:
        before = [{"role": "system", "content": system}] if system else []
        try:
            ids = self.chat.prompt([*before, *messages])
        except ValueError as error:
            raise BadInput(f"{self.name}: {error}") from error
        if self.max_positions and len(ids) >= self.max_positions:
            raise BadInput(
                f"{self.name}: the dialogue has {len(ids)} tokens, and the model has {self.max_positions} positions; /reset forgets it"
            )
        return ids

    def _generate(self, ids: list[int], drawing: Drawing, stream: _Stream) -> None:
        if drawing.seed is not None:
            torch.manual_seed(drawing.seed)
        room = drawing.max_new_tokens if not self.max_positions else min(drawing.max_new_tokens, self.max_positions - len(ids))
        ends = sorted(self.chat.stop_ids)
        drawn = {"do_sample": True, "temperature": drawing.temperature, "top_k": 0, "top_p": 1.0} if drawing.temperature else {}
        inputs = torch.tensor([ids], device=self.lm.device)
        self.lm.generate(
            inputs, attention_mask=torch.ones_like(inputs), streamer=stream,
            generation_config=GenerationConfig(max_new_tokens=room, eos_token_id=ends, pad_token_id=ends[0], **drawn),
        )


class _Stream(BaseStreamer):
    """What `generate` hands its tokens to."""

    def __init__(self, chat: ChatFormat, hear: Hear):
        self._chat, self._hear = chat, hear
        self._ids: list[int] = []
        self._heard = 0
        self.begun = False
        """Whether the prompt has been handed over, which comes first."""

    @property
    def text(self) -> str:
        return self._chat.decode(self._ids)

    def put(self, value: torch.Tensor) -> None:
        if not self.begun:
            self.begun = True
            return
        self._ids += value.flatten().tolist()
        if not (text := self.text).endswith("\N{REPLACEMENT CHARACTER}"):  # else a part of a letter: its other tokens follow
            self._tell(text)

    def end(self) -> None:
        self._tell(self.text)

    def _tell(self, text: str) -> None:
        new, self._heard = text[self._heard :], max(self._heard, len(text))
        if new:
            self._hear(printable(new))


def load(chosen: Chosen) -> Talker:
    """Raises BadInput for what is no model, or not of this program's families."""
    saved = chosen.saved.fetched(chosen.storage)
    facts = inspect_model(chosen.config(saved))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = chosen.model.dtype
    dtype = wanted if wanted != "auto" else "bfloat16" if device == "cuda" else "float32"
    lm = load_to_generate(facts.saved, dtype=dtype, device=device)
    lm.generation_config = GenerationConfig()  # the folder's own top_k and penalties are no part of theta
    return Talker(chosen.name, lm, facts.chat, facts.max_positions)
