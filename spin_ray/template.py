"""Where an answer stands in what a chat template writes.

Text only; `chat.py` makes token ids of it and has the contract. Nothing is known here about any template: how one writes an
assistant's turn is seen by rendering a dialogue with a marker in the place of the answer's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from spin_ray.leftout import LeftOut, keys
from spin_ray.markers import MARK
from spin_ray.rendering import PLAIN, Dialogue, Message, RejectedRoles, Renderer, clean, shared_end, squeezed

_QUESTION: Message = {"role": "user", "content": "a"}
_SYSTEM: Message = {"role": "system", "content": "c"}
_ANSWER: Message = {"role": "assistant", "content": MARK}
_THOUGHTFUL: Message = {**_ANSWER, "reasoning_content": "c"}


@dataclass(frozen=True)
class Turn:
    """What the template writes around an assistant's text."""

    header: str
    """What the sampler gets after the template's own prompt; empty where the generation prompt has it, or there is none."""
    lead: str
    """Between the prompt and the text; generated with the answer."""
    tail: str
    """From the text's end to the end of the rendered dialogue."""


class Cut(NamedTuple):
    """One row as text: prompt, and answer with all that the template puts around its text."""

    prompt: str
    answer: str
    tail: str
    """How `answer` ends, after its text."""


class PromptDiffers(ValueError):
    """The sampler's prompt is not what stands before an answer in the rendered dialogue."""

    def __init__(self, given: str, head: str):
        super().__init__(
            "the chat template's generation prompt is not how it begins an assistant turn: the sampler's prompt ends with "
            f"{_end(given)!r}, before an answer stands {_end(head)!r}; model.chat_template takes another template"
        )


class Template:
    """A tokenizer's chat template. Raises ValueError, in one line, if it cannot write a question and its answer."""

    def __init__(self, tokenizer: Any):
        self.renderer = Renderer(tokenizer)
        self._left_out = LeftOut(self.renderer)
        self._turn: Turn | None = None
        self.probe, self.turn = self._learn_probe()
        self._turn = self.turn

    def _learn_probe(self) -> tuple[Dialogue, Turn]:
        """The first question and answer that the template can write: with a system text, or with a thought, if it wants one."""
        refusals = []
        for parts, prompt, answer in product((False, True), ([_QUESTION], [_SYSTEM, _QUESTION]), (_ANSWER, _THOUGHTFUL)):
            self.renderer.parts = parts
            probe = Dialogue(prompt, answer)
            try:
                return probe, self._turn_around(probe, self.renderer.given(probe), *self._around(probe))
            except ValueError as error:
                refusals.append(error)
        raise refusals[0]

    def dialogue(self, prompt: Sequence[Message], answer: Message, tools: list | None) -> tuple[Dialogue, list[str]]:
        """A row in the form in which the template uses all of it, and notes. Raises ValueError with the name of what it does not use."""
        row = Dialogue([clean(message) for message in prompt], clean(answer), tools or None)
        form, notes = self._left_out.form(row)
        return row._replace(form=form), notes

    def cut(self, prompt: Sequence[Message], answer: Message, tools: list | None) -> tuple[Cut, set[str]]:
        """Render a row and cut it where its answer begins; with notes. Raises ValueError if the template drops any part of it."""
        row, names = self.dialogue(prompt, answer, tools)
        whole = self.renderer.whole(row)  # first: the roles that an error names are all of the row's
        given, notes = self.renderer.given(row), set(names)
        found = self._as_probed(row, given, whole) or self._by_mark(row, given, whole, notes)
        self._left_out.check_texts(row, given, whole, found.answer, notes)
        return found, notes

    def between_turns(self) -> tuple[str, str]:
        """What stands before the first user's text, and between an answer and the next user's text; empty if turns cannot follow."""
        question = {**_QUESTION, "content": MARK}
        try:
            parts = self.renderer.render([question, _ANSWER, question], None, PLAIN).split(MARK)
        except RejectedRoles:
            return "", ""
        return (parts[0], parts[2]) if len(parts) == 4 else ("", "")

    def _as_probed(self, row: Dialogue, given: str, whole: str) -> Cut | None:
        """The cut of a row that is rendered as the probe was, but for its texts."""
        turn, begin = self.turn, given + self.turn.header
        rest = whole[len(begin) :]
        body = rest[len(turn.lead) : len(rest) - len(turn.tail)]
        fits = whole == begin + turn.lead + body + turn.tail and body.strip() == row.answer["content"].strip()
        return Cut(begin, rest, turn.tail) if fits else None

    def _by_mark(self, row: Dialogue, given: str, whole: str, notes: set[str]) -> Cut:
        """The cut of any other row, learnt from the same row with a marker for its answer."""
        turn, start = self._learn_row(row, given, whole)
        found = Cut(given + turn.header, whole[start:], turn.tail if whole.endswith(turn.tail) else self.turn.tail)
        if not whole.endswith(found.tail):
            raise ValueError(f"the chat template does not end this answer as others: with {_end(whole)!r}")
        if found.tail.strip() and not self.turn.tail.strip() and not keys(row.answer):
            raise ValueError(f"the chat template writes {_begin(found.tail)!r} after this answer, and nothing after others")
        if not whole.startswith(found.prompt):
            notes.add("prompt rendered otherwise once answered")
        self._answer_is_whole(row, found, given, notes)
        return found

    def _learn_row(self, row: Dialogue, given: str, whole: str) -> tuple[Turn, int]:
        """How this row's assistant turn is written, and where in the rendered dialogue what belongs to the answer begins."""
        head, tail = self._around(row)
        try:
            turn = self._turn_around(row, given, head, tail)
        except PromptDiffers:
            if not whole.startswith(given) or not self.renderer.asked(row, given):
                raise
            return Turn("", "", tail), len(given)  # the turn begins otherwise for other answers, and as it should for this one
        start = len(head) - len(turn.lead)
        if whole[:start] != head[:start]:
            raise PromptDiffers(given, whole[: len(given)])
        return turn, start

    def _around(self, row: Dialogue) -> tuple[str, str]:
        """What the template writes before and after the text of this row's answer, seen with a marker in its place."""
        marked = row._replace(answer={**row.answer, "content": MARK})
        head, mark, tail = self.renderer.whole(marked).partition(MARK)
        if not mark or MARK in tail:
            raise ValueError("the chat template writes the assistant's text " + ("more than once" if mark else "not at all"))
        return head, tail

    def _turn_around(self, row: Dialogue, given: str, head: str, tail: str) -> Turn:
        """What of the text before an answer is header, and what is generated with the answer."""
        if not head.startswith(given):
            return self._turn_apart(row, given, head, tail)
        lead = head[len(given) :]
        header = lead if lead.strip() and not self.renderer.asked(row, given) else ""
        return Turn(header, lead[len(header) :], tail)

    def _turn_apart(self, row: Dialogue, given: str, head: str, tail: str) -> Turn:
        """The same where the prompt is not how the answered dialogue begins: it must be so from the last message's text on."""
        turn, last = self._turn or Turn("", "", ""), row.prompt[-1]["content"].strip()
        if not self._turn or not last or last not in shared_end(head.removesuffix(turn.header + turn.lead), given):
            raise PromptDiffers(given, head)
        return Turn(turn.header, turn.lead, tail)

    def _answer_is_whole(self, row: Dialogue, found: Cut, given: str, notes: set[str]) -> None:
        """The row's text is in what is rendered for it. It may begin with what the generation prompt already says (<think>)."""
        content, body = row.answer["content"], found.answer[: len(found.answer) - len(found.tail)]
        if content.strip() in body:
            return
        rendered = self.renderer.asked(row, given) + body
        if squeezed(content) not in squeezed(rendered):
            raise ValueError(f"the chat template drops a part of the answer: of {_begin(content)!r} it makes {_begin(body)!r}")
        if content.strip() not in rendered:
            notes.add("answer spaced otherwise by the template")


def _begin(text: str, size: int = 40) -> str:
    return text if len(text) <= size else text[:size] + "…"


def _end(text: str, size: int = 40) -> str:
    return text if len(text) <= size else "…" + text[-size:]
