"""Nothing of a row may vanish in its chat template: what the template leaves out is refused by name, or counted where that is its way.

Whether a template uses a part of a dialogue is seen by rendering it with that part changed.
"""

from __future__ import annotations

from typing import Any

from spin_ray.rendering import FORMS, Dialogue, Form, Message, RejectedRoles, Renderer, squeezed, written_by_python

MARK = "Zq7markerqZ"
"""Stands for a part of a dialogue: letters and digits, which no template trims, splits or escapes."""
Verdict = tuple[Form, list[str]]
"""The form in which the template uses everything, and notes for the count line."""


class LeftOut:
    """What a template uses of dialogues, by their shape (roles, keys, tools) and by their texts."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._verdicts: dict[tuple, Verdict | str] = {}

    def form(self, row: Dialogue) -> Verdict:
        """The first form in which the template uses every part of dialogues of this shape; one of each shape is looked at.

        Raises ValueError with the name of what it does not use.
        """
        shape = (row.tools is not None, *((m["role"], bool(m["content"].strip()), *keys(m)) for m in row.whole))
        if shape not in self._verdicts:
            self._verdicts[shape] = self._judge(row)
        verdict = self._verdicts[shape]
        if isinstance(verdict, str):
            raise ValueError(verdict)
        return verdict

    def check_texts(self, row: Dialogue, given: str, whole: str, answered: str, notes: set[str]) -> None:
        """Every message's text is in the prompt, and every other text of the answer's message (its reasoning) in what is
        rendered for it; or it has some other effect, which is noted. Raises ValueError for one that has none."""
        for k, message in enumerate(row.prompt):
            if message["content"].strip() not in given:
                if any(self._same(given, other) for other in _with_another_text(row, k)):
                    raise ValueError(f"the chat template drops the {message['role']}'s text (message {k + 1})")
                notes.add("message rendered in another form")
        for key in keys(row.answer):
            if isinstance(row.answer[key], str) and squeezed(row.answer[key]) not in squeezed(answered):
                if self._whole_same(whole, _without(row, key)):
                    raise ValueError(f"the chat template does not use {key}")
                notes.add(f"{key} rendered in another form")

    def _judge(self, row: Dialogue) -> Verdict | str:
        calls = any("tool_calls" in message for message in row.whole)
        refusals: list[ValueError] = []
        for form in FORMS if calls else FORMS[:1]:
            try:
                return form, self._unused(row._replace(form=form))
            except ValueError as error:
                refusals.append(error)
        refusals.sort(key=lambda error: isinstance(error, RejectedRoles))
        if isinstance(refusals[0], RejectedRoles):  # it may lie in this row's texts, and is no verdict on the shape
            raise refusals[0]
        return str(refusals[0])

    def _unused(self, row: Dialogue) -> list[str]:
        """Notes on what the template may leave out. Raises ValueError with the name of what it may not."""
        whole, given = self._renderer.whole(row), self._renderer.given(row)
        if any(written in given + whole for written in written_by_python(row)):
            raise ValueError("the chat template writes the arguments of a tool call as Python does, not as JSON")
        if row.tools and self._same(given, row._replace(tools=None)):
            raise ValueError("the chat template does not use tools")
        notes = []
        for k, message in enumerate(row.prompt):
            if message["content"].strip() and self._same(given, _changed(row, k, content=MARK)):
                raise ValueError(f"the chat template drops the {message['role']}'s text (message {k + 1})")
            notes += [self._why_unused(row, k, key) for key in keys(message) if self._same(given, _changed(row, k, **{key: None}))]
        for key in keys(row.answer):
            if self._whole_same(whole, _without(row, key)):
                raise ValueError(f"the chat template does not use {key}")
        return notes

    def _why_unused(self, row: Dialogue, place: int, key: str) -> str:
        """The note on an unused key; ValueError if it says something that the model would not see."""
        message = row.prompt[place]
        if key == "tool_call_id" or (key == "name" and message["role"] == "tool"):
            return f"{key} not used by the template"  # it says which call is answered, which the order says too
        last = row._replace(prompt=row.prompt[:place], answer=message)
        if message["role"] == "assistant" and self._uses_in_last(last, key):
            return f"{key} of earlier turns left out by the template"
        raise ValueError(f"the chat template does not use {key}")

    def _uses_in_last(self, row: Dialogue, key: str) -> bool:
        try:
            return not self._whole_same(self._renderer.whole(row), _without(row, key))
        except RejectedRoles:  # no dialogue may end there
            return False

    def _same(self, given: str, row: Dialogue) -> bool:
        """Whether a row, changed in one place, has the same prompt. A template that fails on it has looked at the place."""
        try:
            return self._renderer.given(row) == given
        except RejectedRoles:
            return False

    def _whole_same(self, whole: str, row: Dialogue) -> bool:
        try:
            return self._renderer.whole(row) == whole
        except RejectedRoles:
            return False


def keys(message: Message) -> list[str]:
    """The keys of a message that not every message has."""
    return [key for key in message if key not in ("role", "content")]


def _changed(row: Dialogue, place: int, **changes: Any) -> Dialogue:
    """The row with one message of its prompt changed; a key that becomes None is taken out."""
    changed = {key: value for key, value in {**row.prompt[place], **changes}.items() if value is not None}
    return row._replace(prompt=[*row.prompt[:place], changed, *row.prompt[place + 1 :]])


def _with_another_text(row: Dialogue, place: int) -> list[Dialogue]:
    """The row with another text in one message, with none, and without the message: a text that matters differs from all three."""
    gone = row._replace(prompt=[*row.prompt[:place], *row.prompt[place + 1 :]])
    return [_changed(row, place, content=MARK), _changed(row, place, content=""), gone]


def _without(row: Dialogue, key: str) -> Dialogue:
    return row._replace(answer={k: value for k, value in row.answer.items() if k != key})
