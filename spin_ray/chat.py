"""The one place that turns messages into token ids.

Sampling and training share what is made here: the sampler gets `prompt_ids`, the learner trains on exactly those ids
followed by the answer's. Nothing is decoded and encoded again on the way (invariant 1 of ARCHITECTURE.md).

The contract. A template is a program; what it means is read from what it renders (`rendering.py`,
`template.py`, `leftout.py`), never from its source:

1. The prompt is what the template renders for the dialogue with `add_generation_prompt=True`.
2. The answer is what the rendered dialogue has after it, up to and with the end token: what stands before the answer's text
   (Qwen3's empty <think> block), the text as the template writes it, and the token that closes it.
3. Prompt and answer are the ids of the rendered dialogue. Where one token would span their border, the answer begins on a
   fresh token, as the sampler's does, encoded without the prefix space of a text's begin.
4. The end token is in the answer once, last. A stop token inside of it is refused.
5. No part of a row vanishes: what the template leaves out is refused, what it writes in another form is counted. A part is left
   out if nothing changes when a marker takes its place: that the template looks whether it is there is not enough.

| what templates do | prompt | answer |
|---|---|---|
| ignore `add_generation_prompt`, write a header before the answer | the rendering and the header | text, end |
| ignore it, write only a space there (Mistral) | the rendering | space, text, end |
| begin the answer's thought in the generation prompt (Qwen3 Thinking) | the rendering, with <think> | the rest, </think>, text, end |
| add a generation prompt that the dialogue does not have (R1's <think>) | refused at start | |
| want contents as lists of parts (multimodal ones) | get them so | |
| put the system text before the last user turn only while that is last (Mistral v0.3) | the rendering, with it; counted | as rendered |
| drop <think>…</think> of earlier turns (Qwen3, R1) | the rendering; counted | |
| drop it of the answer (R1) | | refused |
| write it with other blanks or blank lines (Qwen3) | | as rendered; counted |
| close an answer with an added token, special or not | | that token ends it |
| close it with several tokens, EOS among them (Command R7B) | | up to EOS |
| close it with words before EOS | | words, EOS |
| write EOS after the whole dialogue too (Phi-3) | without | ends at the first |
| close it with words that are no token | refused at start | |
| close only earlier turns | | ends with the token that closes those |
| close no turn, and the generation config stops at the next turn's header (GLM-4) | | ends with that header's token |
| close no turn | | the tokenizer's EOS is added |
| do not use tools, reasoning_content or any other key, or a part of it (a second call) | refused, by name | refused, by name |
| leave out parts of a tool's schema (gpt-oss, Gemma 4) | the rendering; counted, by name | |
| find their own tokens in a row's text | the rendering; counted | as rendered; a stop token is refused |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from spin_ray.errors import BadInput
from spin_ray.rendering import Message
from spin_ray.template import Cut, Template
from spin_ray.tokenizer import shipped_templates

Row = tuple[Sequence[Message], "str | Message", "list | None"]
"""Prompt, answer and tools: the arguments of `ChatFormat.encode`."""
Ids = tuple[list[int], list[int]]
_ANCHORS = ("\n", ".", ":", "a", "1")
"""Texts behind which an answer is encoded to see it without the prefix space of a text's begin; one that no answer's first token joins."""


class ChatFormat:
    """A tokenizer's chat template and the tokens that end an answer.

    `end_id` is the token with which the template closes an assistant turn (or the tokenizer's EOS where the template
    closes it with none); `stop_ids` adds every other token on which the sampler must stop.
    `vocab_size` is the number of tokens that the model has rows for; None: not known.
    Raises BadInput if there is no template, no end token, or the template cannot be continued from its own prompt.
    """

    def __init__(self, tokenizer: Any, *, name: str = "tokenizer", eos_ids: Sequence[int] = (), vocab_size: int | None = None):
        if not getattr(tokenizer, "chat_template", None):
            ways = f"a Jinja file, or one of {', '.join(shipped_templates())}"
            raise BadInput(f"{name}: the tokenizer has no chat template; model.chat_template takes one: {ways}")
        self.tokenizer, self._vocab_size = tokenizer, vocab_size
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._eos: set[int] = {*own, *eos_ids}
        tokens = {**{token.content: i for i, token in tokenizer.added_tokens_decoder.items()}, **{self._text([i]): i for i in self._eos}}
        self._tokens = {text: tokens[text] for text in sorted(tokens, key=len, reverse=True) if text.strip()}
        try:
            self.template = Template(tokenizer)
            closing = self._closing_token(self.template.turn.tail)
            self.closes = closing is not None
            self.end_id: int = self._end_of_unclosed() if closing is None else closing
            self._stops = frozenset([self.end_id, *self._eos])
            # GPT-2's unknown token is its EOS, and its vocabulary has every byte: nothing is unknown there.
            self.unknown_id: int | None = None if tokenizer.unk_token_id in self._stops else tokenizer.unk_token_id
            self._ends_of_probe = self._ends_in(self.template.turn.tail)
            self._signs = self._signs_of_turns()
            self._refuse_ids_past_the_model([self.end_id])
            self.stop_ids: frozenset[int] = frozenset(i for i in self._stops if vocab_size is None or i < vocab_size)
            self.encode(self.template.probe.prompt, self.template.probe.answer)
        except ValueError as error:
            raise BadInput(f"{name}: the chat template cannot be used: {error}") from error

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens on which transformers' `generate` ends a text: the tokenizer's EOS and those of the generation config."""
        return self.stop_ids & self._eos

    def encode(
        self, prompt: Sequence[Message], answer: str | Message, *, tools: list | None = None, notes: Counter | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of a dialogue up to the generation prompt, and of the answer with its end-of-turn token.

        The answer's ids hold the end token exactly once, at their end. `notes` counts, by a name for the user, what was
        allowed though it deserves a word. Raises ValueError if the template rejects the roles or drops a part of the row,
        if the answer itself contains an end token, or if the model has no row for a token.
        """
        [made] = self.encode_many([(prompt, answer, tools)], notes)
        if isinstance(made, ValueError):
            raise made
        return made

    def encode_many(self, rows: Sequence[Row], notes: Counter | None = None) -> list[Ids | ValueError]:
        """`encode` for many rows, tokenised in one call; in place of a row that it refuses stands the ValueError."""
        cuts = [self._cut(*row) for row in rows]
        texts = [(cut.prompt, cut.prompt + cut.answer) for cut, _ in cuts if isinstance(cut, Cut)]
        try:
            ids = iter(self._ids(list(chain.from_iterable(texts))))
        except ValueError as error:  # of one row; which, is seen one by one
            return [error] if len(rows) == 1 else [self.encode_many([row], notes)[0] for row in rows]
        made: list[Ids | ValueError] = []
        for cut, found in cuts:
            try:
                made.append(self._joined(cut, next(ids), next(ids), found) if isinstance(cut, Cut) else cut)
            except ValueError as error:
                made.append(error)
            if notes is not None and not isinstance(made[-1], ValueError):
                notes.update(sorted(found))
        return made

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue up to the generation prompt, for a model that is to answer it. Raises ValueError as `encode` does."""
        return self.encode(messages, self.template.probe.answer)[0]

    def decode(self, answer_ids: Sequence[int]) -> str:
        """The text of an answer, for people and for exact match; never fed back to a model."""
        words = [int(i) for i in answer_ids if int(i) not in self._stops]  # not all tokens that end an answer are special
        return self.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut(self, prompt: Sequence[Message], answer: str | Message, tools: list | None) -> tuple[Cut | ValueError, set[str]]:
        message = {"role": "assistant", **({"content": answer} if isinstance(answer, str) else answer)}
        try:
            cut, notes = self.template.cut(prompt, message, tools)
            (cut.prompt + cut.answer).encode()  # half a surrogate pair, which JSON can hold and Unicode cannot
        except ValueError as error:
            return error, set()
        if any(sign in (turn.get("content") or "") for turn in (*prompt, message) for sign in self._signs):
            notes.add("with tokens of the template in a text")
        return cut, notes

    def _signs_of_turns(self) -> list[str]:
        """The added tokens with which the template begins and ends turns: in a text of a row, a model takes them for these."""
        around = self.template.renderer.given(self.template.probe) + self.template.turn.tail
        return [text for text in self._tokens if text in around and not text.startswith("<think")]

    def _joined(self, cut: Cut, prompt_ids: list[int], whole: list[int], notes: set[str]) -> Ids:
        """Prompt and answer of a row from the ids of its prompt and of its dialogue. Raises ValueError if they do not fit."""
        answer_ids = whole[len(prompt_ids) :]
        if whole[: len(prompt_ids)] != prompt_ids:
            notes.add("answer begins on a fresh token")
            answer_ids = self._fresh(prompt_ids, whole, cut.answer)
        answer_ids = self._ended(answer_ids, cut.tail)
        if self._vocab_size is not None:
            self._refuse_ids_past_the_model([*prompt_ids, *answer_ids])
        unknown = prompt_ids.count(self.unknown_id) + answer_ids.count(self.unknown_id)
        if unknown and unknown > (cut.prompt + cut.answer).count(self.tokenizer.unk_token):
            notes.add("with words that the tokenizer does not know")
        return prompt_ids, answer_ids

    def _fresh(self, prompt_ids: list[int], whole: list[int], answer: str) -> list[int]:
        """Ids of an answer that begins on a fresh token: behind those of the prompt they must read as the dialogue does."""
        text = self._text(whole)
        for ids in self._ways_to_begin(answer):
            if self._text([*prompt_ids, *ids]) == text:
                return ids
        raise ValueError("one token spans the border of prompt and answer, and the tokenizer has no other way to write them")

    def _ways_to_begin(self, answer: str) -> Iterator[list[int]]:
        """Ids of a text that is not the begin of one: as it is, if the tokenizer adds nothing there; else cut off behind an anchor."""
        yield from self._ids([answer])
        for anchor in _ANCHORS:
            before, both = self._ids([anchor, anchor + answer])
            if both[: len(before)] == before:
                yield both[len(before) :]

    def _ended(self, ids: list[int], tail: str) -> list[int]:
        """An answer's ids up to its end token. Raises ValueError if the text itself contains a token on which sampling stops."""
        ends = [k for k, token in enumerate(ids) if token in self._stops]
        if len(ends) > (self._ends_of_probe if tail == self.template.turn.tail else self._ends_in(tail)):
            raise ValueError(f"the answer contains the end-of-turn token {self.tokenizer.convert_ids_to_tokens(ids[ends[0]])}")
        if not self.closes and not ends:
            return [*ids, self.end_id]
        if not ends or ids[ends[0]] != self.end_id:
            end = self.tokenizer.convert_ids_to_tokens(self.end_id)
            raise ValueError(f"the chat template does not end this answer with {end}, as others")
        return ids[: ends[0] + 1]

    def _ends_in(self, text: str) -> int:
        [ids] = self._ids([text])
        return sum(token in self._stops for token in ids)

    # The end token.

    def _closing_token(self, tail: str) -> int | None:
        """The token that closes an answer, read from what the template writes after it; None if that is blank."""
        run = self._run_of_tokens(tail.lstrip())
        if run:
            return self._end_of_run(run)
        [ids] = self._ids([tail])
        for token in ids:
            if token in self._eos:  # words before EOS belong to the answer
                return token
        if tail.strip():
            written = tail.strip()[:40]
            raise ValueError(f"it closes an answer with {written!r}, which is no token of the tokenizer: nothing would end an answer")
        return None

    def _run_of_tokens(self, text: str) -> list[str]:
        """The added tokens, special or not, that stand at a text's begin with nothing between them."""
        run: list[str] = []
        while (found := next((t for t in self._tokens if text.startswith(t)), None)) is not None:
            run.append(found)
            text = text.removeprefix(found)
        return run

    def _end_of_run(self, run: list[str]) -> int:
        """The first token of those that close an answer; EOS behind it if that closes earlier turns too (Command R7B)."""
        closed = self.template.between_turns()[1].lstrip()
        for k, text in enumerate(run):
            if self._tokens[text] in self._eos and closed.startswith("".join(run[: k + 1])):
                return self._tokens[text]
        return self._tokens[run[0]]

    def _end_of_unclosed(self) -> int:
        """What ends an answer that the template leaves open: what follows earlier answers if that is a token, else the tokenizer's EOS.

        The next turn's header counts only where the model's generation config says that it stops there (GLM-4's <|user|>).
        """
        first, between = self.template.between_turns()
        [header], [ids] = self._ids([first]), self._ids([between])
        follows = self._first_words(ids)
        while header and ids and header[-1] == ids[-1]:
            header, ids = header[:-1], ids[:-1]
        closing = self._first_words(ids)
        for token, ends in ((follows, self._eos), (closing, {*self._tokens.values(), *self._eos})):
            if token in ends:
                return token
        if self.tokenizer.eos_token_id is None:
            raise ValueError("neither it nor the tokenizer has a token that ends an answer")
        return self.tokenizer.eos_token_id

    def _first_words(self, ids: Sequence[int]) -> int | None:
        return next((i for i in ids if self._text([i]).strip()), None)

    # Tokens.

    def _refuse_ids_past_the_model(self, ids: Sequence[int]) -> None:
        largest = max(ids, default=0)
        if self._vocab_size is not None and largest >= self._vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(f"token {token!r} has id {largest}, and the model has {self._vocab_size} rows for tokens")

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        try:
            return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        except Exception as error:  # tokenizers raises Exception itself; a model's own code may raise anything
            raise ValueError(f"the tokenizer fails on this text: {' '.join(str(error).split())}") from error

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
