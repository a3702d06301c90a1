"""Dialogues as text: a tokenizer's chat template, run in transformers' sandbox, and the forms in which it takes messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
"""role and content, both text, and whatever other keys the template reads (reasoning_content, tool_calls, name)."""


class Form(NamedTuple):
    """How calls of tools are handed to the template: some want the arguments as text, or no content beside the calls."""

    arguments_as_text: bool = False
    no_content: bool = False


PLAIN = Form()
FORMS = (PLAIN, Form(no_content=True), Form(arguments_as_text=True), Form(True, True))


class Dialogue(NamedTuple):
    """A row for the template: messages without empty keys."""

    prompt: list[Message]
    answer: Message
    tools: list | None = None
    form: Form = PLAIN

    @property
    def whole(self) -> list[Message]:
        return [*self.prompt, self.answer]


class RejectedRoles(ValueError):
    """The template itself failed on a dialogue."""


class Renderer:
    """A tokenizer's chat template. `parts`: contents are handed over as lists of parts, as templates of multimodal models may want."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.parts = False

    def render(self, messages: Sequence[Message], tools: list | None, form: Form, *, generation: bool = False) -> str:
        """The text of messages, with or without the generation prompt. Raises RejectedRoles, in one line, if the template fails."""
        shaped = [self._shaped(message, form) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(shaped, tools=tools, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # a template is a program of its own; it may fail in any way
            roles = ", ".join(str(message["role"]) for message in messages)
            raise RejectedRoles(f"the chat template rejects the roles {roles}: {' '.join(str(error).split())}") from error

    def given(self, row: Dialogue) -> str:
        """What the sampler gets."""
        return self.render(row.prompt, row.tools, row.form, generation=True)

    def whole(self, row: Dialogue) -> str:
        """The answered dialogue."""
        return self.render(row.whole, row.tools, row.form)

    def asked(self, row: Dialogue, given: str) -> str:
        """The words that `add_generation_prompt` adds. What it takes away (an EOS after the dialogue) does not count."""
        try:
            plain = self.render(row.prompt, row.tools, row.form)
        except RejectedRoles:  # a dialogue that ends with a question must ask for an answer
            return given
        added = given[len(shared_begin(given, plain)) :]
        return added if added.strip() else ""

    def _shaped(self, message: Message, form: Form) -> Message:
        if isinstance(message.get("tool_calls"), list):
            content = None if form.no_content and not message["content"] else message["content"]
            message = {**message, "content": content, "tool_calls": [_shaped_call(call, form) for call in message["tool_calls"]]}
        if not self.parts:
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}] if message["content"] else []}


def clean(message: Message) -> Message:
    """Without keys that say nothing, which templates test for in different ways. Raises ValueError if role or content is no text."""
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"every message needs a role that is text, found {message.get('role')!r}")
    if not isinstance(content, str | None):
        raise ValueError(f"the content of the {message.get('role')}'s message must be text, found {type(content).__name__}")
    return {**{key: value for key, value in message.items() if not _says_nothing(value)}, "content": content or ""}


def _says_nothing(value: Any) -> bool:
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def _shaped_call(call: Any, form: Form) -> Any:
    """A call with its arguments as a dict, which is what transformers advises, or as JSON text."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _shaped_call(call["function"], form)}
    arguments = call.get("arguments")
    if form.arguments_as_text and isinstance(arguments, dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not form.arguments_as_text and isinstance(arguments, str):
        return {**call, "arguments": _dict_of(arguments)}
    return call


def _dict_of(arguments: str) -> Any:
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):  # arguments that are no JSON are handed on as they are
        return arguments
    return read if isinstance(read, dict) else arguments


def shared_begin(one: str, other: str) -> str:
    size = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:size]


def shared_end(one: str, other: str) -> str:
    return shared_begin(one[::-1], other[::-1])[::-1]


def squeezed(text: str) -> str:
    """Without blanks."""
    return "".join(text.split())
