"""Nothing of a row may vanish in its chat template: what the template leaves out is refused by name, or counted where that is its way.

Whether a template writes a part of a dialogue is seen by rendering it with a marker in that part's place: where nothing changes,
the part is left out, whatever else its being there may change.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from spin_ray.markers import MARK, Leaf, marked, marked_only, skeleton
from spin_ray.rendering import FORMS, Dialogue, Form, Message, RejectedRoles, Renderer, squeezed

Verdict = tuple[Form, list[str]]
"""The form in which the template uses everything, and notes for the count line."""
_TOOLS = -1
"""Where a leaf of the tools lies, which are no message."""
_ARGUMENTS = {"Zq7argumentqZ": MARK}
"""What every call is given to see in which form the template wants arguments: no JSON as Python prints it."""


class LeftOut:
    """What a template uses of dialogues, by their shape (roles, keys, tools) and by their texts."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._verdicts: dict[tuple, Verdict | str] = {}

    def form(self, row: Dialogue) -> Verdict:
        """The first form in which the template uses every part of dialogues of this shape; one of each shape is looked at.

        Raises ValueError with the name of what it does not use.
        """
        shape = (skeleton(row.tools), *((m["role"], bool(m["content"].strip()), _shape_of_keys(m)) for m in row.whole))
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
                if self._whole_same(whole, _with(row, len(row.prompt), key, MARK)):
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
        if not row.form.arguments_as_text:
            self._refuse_arguments_by_python(row)
        for k, message in enumerate(row.prompt):
            if message["content"].strip() and self._same(given, _with(row, k, "content", MARK)):
                raise ValueError(f"the chat template drops the {message['role']}'s text (message {k + 1})")
        every, unused = self._leaves(row, given, whole)
        notes = self._about_tools(row, every[_TOOLS], unused[_TOOLS], given)
        for k, message in enumerate(row.whole):
            for key in keys(message):
                if name := self._unused_name(row, k, key, every[k], unused[k], given if k < len(row.prompt) else whole):
                    notes.append(self._why_unused(row, k, key, name))
        return list(dict.fromkeys(notes))

    def _refuse_arguments_by_python(self, row: Dialogue) -> None:
        """A template that wants a call's arguments as text prints an object as Python does; another way of its own is its way."""
        probe = row._replace(
            prompt=[_with_arguments(message, _ARGUMENTS) for message in row.prompt], answer=_with_arguments(row.answer, _ARGUMENTS)
        )
        try:
            written = self._renderer.given(probe) + self._renderer.whole(probe)
        except RejectedRoles:  # it knows which arguments there are
            return
        if repr(_ARGUMENTS) in written:
            raise ValueError("the chat template writes the arguments of a tool call as Python does, not as JSON")

    def _leaves(self, row: Dialogue, given: str, whole: str) -> tuple[dict[int, list[Leaf]], dict[int, list[Leaf]]]:
        """Every text and number of each message's further keys and of the tools, and those that the template does not write."""
        numbers, every = count(1), {place: [] for place in range(_TOOLS, len(row.whole))}
        messages = [
            {**message, **{key: marked(message[key], (key,), numbers, every[k]) for key in keys(message)}}
            for k, message in enumerate(row.whole)
        ]
        tools = marked(row.tools, ("tools",), numbers, every[_TOOLS])
        try:
            changed = Dialogue(messages[:-1], messages[-1], tools, row.form)
            written = {True: self._renderer.given(changed), False: self._renderer.whole(changed)}
        except RejectedRoles:  # it knows some of the values: one by one, then
            written = {True: "", False: ""}
        unused = {}
        for place, leaves in every.items():
            in_prompt = place < len(row.prompt)
            missing = [leaf for leaf in leaves if leaf.mark not in written[in_prompt]]
            same, now = (self._same, given) if in_prompt else (self._whole_same, whole)
            unused[place] = [leaf for leaf in missing if same(now, _with_leaf(row, place, leaf))]
        return every, unused

    def _about_tools(self, row: Dialogue, every: list[Leaf], unused: list[Leaf], given: str) -> list[str]:
        """Notes on parts of tools (a default, a pattern) that are not for this template's model to see; a name is."""
        if row.tools and (every == unused if every else self._same(given, row._replace(tools=None))):
            raise ValueError("the chat template does not use tools")
        for leaf in unused:
            if leaf.path[2:] in (("name",), ("function", "name")):
                raise ValueError(f"the chat template does not use {leaf}")
        return [f"{name} of tools left out by the template" for name in sorted({_last_name(leaf) for leaf in unused})]

    def _unused_name(self, row: Dialogue, place: int, key: str, every: list[Leaf], unused: list[Leaf], now: str) -> str:
        """The name of what is not used of a message's key: the key, or a part of it; empty if all is."""
        own, missing = ([leaf for leaf in leaves if leaf.path[0] == key] for leaves in (every, unused))
        if own:
            return "" if not missing else key if missing == own else str(missing[0])
        same = self._same if place < len(row.prompt) else self._whole_same
        return key if same(now, _with(row, place, key, None)) else ""

    def _why_unused(self, row: Dialogue, place: int, key: str, name: str) -> str:
        """The note on what is not used; ValueError if it says something that the model would not see."""
        message = row.whole[place]
        if key == "tool_call_id" or (key == "name" and message["role"] == "tool"):
            return f"{key} not used by the template"  # it says which call is answered, which the order says too
        last = row._replace(prompt=row.prompt[:place], answer=message)
        if place < len(row.prompt) and message["role"] == "assistant" and name == key and self._uses_in_last(last, key):
            return f"{key} of earlier turns left out by the template"
        raise ValueError(f"the chat template does not use {name}")

    def _uses_in_last(self, row: Dialogue, key: str) -> bool:
        place = len(row.prompt)
        try:
            whole = self._renderer.whole(row)
            _, unused = self._leaves(row, self._renderer.given(row), whole)
        except RejectedRoles:  # no dialogue may end there
            return False
        if any(leaf.path[0] == key for leaf in unused[place]):
            return False
        return not self._whole_same(whole, _with(row, place, key, None))

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


def _shape_of_keys(message: Message) -> tuple:
    return tuple((key, skeleton(message[key])) for key in keys(message))


def _with(row: Dialogue, place: int, key: str, value: Any) -> Dialogue:
    """The row with one key of a message changed, or taken out (None)."""
    changed = {name: item for name, item in {**row.whole[place], key: value}.items() if item is not None}
    return _with_message(row, place, changed)


def _with_message(row: Dialogue, place: int, message: Message) -> Dialogue:
    if place == len(row.prompt):
        return row._replace(answer=message)
    return row._replace(prompt=[*row.prompt[:place], message, *row.prompt[place + 1 :]])


def _with_leaf(row: Dialogue, place: int, leaf: Leaf) -> Dialogue:
    """The row with a marker for one leaf."""
    if place == _TOOLS:
        return row._replace(tools=marked_only(row.tools, ("tools",), leaf))
    key = leaf.path[0]
    return _with_message(row, place, {**row.whole[place], key: marked_only(row.whole[place][key], (key,), leaf)})


def _with_arguments(message: Message, arguments: dict[str, str]) -> Message:
    if not isinstance(message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [_call_with(call, arguments) for call in message["tool_calls"]]}


def _call_with(call: Any, arguments: dict[str, str]) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _call_with(call["function"], arguments)}
    return {**call, "arguments": arguments} if isinstance(call, dict) else call


def _with_another_text(row: Dialogue, place: int) -> list[Dialogue]:
    """The row with another text in one message, with none, and without the message: a text that matters differs from all three."""
    gone = row._replace(prompt=[*row.prompt[:place], *row.prompt[place + 1 :]])
    return [_with(row, place, "content", MARK), _with(row, place, "content", ""), gone]


def _last_name(leaf: Leaf) -> str:
    return next(str(step) for step in reversed(leaf.path) if not isinstance(step, int))
