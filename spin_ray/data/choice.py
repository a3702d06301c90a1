"""Which assistant turns of a dialogue become y."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from spin_ray.chat import Message
from spin_ray.data.messages import Turn
from spin_ray.data.rows import Dialogue


@dataclass(frozen=True, slots=True)
class Chosen:
    """The assistant turns of a dialogue that become y."""

    dialogue: Dialogue
    places: list[int]
    skipped: Counter[str]
    """Turns that would have been chosen, by what speaks against them."""
    rejected: Chosen | None = None
    """The worse answer to the same prompt, in preference rows."""

    def problem(self, place: int) -> ValueError | None:
        return None if self._has_text(place) else ValueError("empty answer")

    def requests(self) -> Iterator[tuple[list[Message], str | Message, list[Any] | None]]:
        """(prompt, answer, tools) of every turn that has text; a turn of role and content only is its text. A rejected one comes last."""
        messages = self.dialogue.messages
        for place in filter(self._has_text, self.places):
            answer = messages[place]
            yield messages[:place], answer["content"] if len(answer) == 2 else answer, self.dialogue.tools
        if self.rejected:
            yield from self.rejected.requests()

    def _has_text(self, place: int) -> bool:
        return bool(self.dialogue.turns[place].message["content"].strip())


def choose_preference(dialogue: Dialogue) -> Chosen:
    """The last turn of a preference row, with the rejected one. Raises ValueError if they do not answer the same prompt."""
    better, worse = (choose(each, "last") for each in (dialogue, replace(dialogue, turns=dialogue.rejected, rejected=None)))
    prompts = [one.dialogue.messages[: one.places[0]] for one in (better, worse)]
    if prompts[0] != prompts[1]:
        raise ValueError("chosen and rejected do not answer the same prompt")
    if better.dialogue.turns[better.places[0]] == worse.dialogue.turns[worse.places[0]]:
        raise ValueError("chosen and rejected are the same answer")
    return replace(better, rejected=worse)


def choose(dialogue: Dialogue, which: str) -> Chosen:
    """The last, the first, or all of the assistant turns that may be trained on. Raises ValueError if there is none.

    A turn of weight 0 is context, and one that only calls a tool has no text that could be y.
    """
    turns = dialogue.turns
    places = [k for k, turn in enumerate(turns) if turn.message["role"] == "assistant"]
    if places in ([], [0]):
        raise ValueError("no assistant answer" if not places else "the dialogue begins with the assistant")
    chosen, skipped = [], Counter()
    for place in reversed(places) if which == "last" else places:
        if reason := "turns_that_open_the_dialogue" if place == 0 else _is_context(turns[place]):
            skipped[reason] += 1
        else:
            chosen.append(place)
            if which != "all":
                break
    if not chosen:
        raise ValueError(f"no assistant answer to train on: {', '.join(f'{name} {n}'.replace('_', ' ') for name, n in skipped.items())}")
    behind = sum(turn.message["role"] != "assistant" for turn in turns[max(chosen) + 1 :]) if which != "first" else 0
    return Chosen(dialogue, chosen, skipped + Counter(turns_behind_the_last_answer=behind))


def _is_context(turn: Turn) -> str:
    """Why an assistant turn is none to train on; empty if it is one."""
    if not turn.trains:
        return "turns_left_out_by_weight"
    only_calls = "tool_calls" in turn.message and not turn.message["content"].strip()
    return "turns_that_only_call_tools" if only_calls else ""
