"""A row of any known format as one dialogue.

| the row has | the dialogue |
|---|---|
| messages, conversations, conversation, dialogue or dialog: a list of messages, or its JSON text | as it stands |
| real (SPIN's own; generated is ignored) | as it stands |
| prompt + response, completion or chosen | text, or messages; with chosen, rejected is ignored, or in DPO the worse answer |
| instruction (+ input or context) + output, response or chosen | Alpaca, Dolly: what follows the instruction is set off by a blank line |
| question or query + response, answer or chosen; problem + solution; input + output | a question and its answer |
| chosen alone | preference rows whose chosen holds the prompt too |
| system or system_prompt, in any of these | the first turn; refused beside another system text |
| history: [[question, answer], ...] or messages, in any of these | the turns after the system text |
| tools: a list, or its JSON text | goes to the chat template |
| answer, where it is not what is trained on | what a right reply must say: held-out exact match |
| a known column that only repeats what the dialogue says | ignored, counted |

Everything else is harmless by name (columns.py), named in data.ignore_columns, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spin_ray.chat import Message
from spin_ray.data.columns import Sieve, is_absent, present
from spin_ray.data.messages import NO, YES, Turn, from_json, read_turns

WHOLE = ("messages", "real", "conversations", "conversation", "dialogue", "dialog")
"""Columns that hold a whole dialogue; the first that is there is read."""
ANSWERS = {
    "prompt": ("response", "completion", "chosen"), "instruction": ("output", "response", "chosen"),
    "question": ("response", "answer", "chosen"), "query": ("response", "answer", "chosen"), "problem": ("solution",), "input": ("output",),
}
"""Column of the question -> columns that may hold the answer."""
CONTEXTS = {"instruction": ("input", "context")}
"""Column of the question -> columns whose text follows it."""
LONG_PROMPT = 8
"""Words of a prompt with which no answer begins by chance."""
SYSTEM = ("system", "system_prompt")
_BESIDE = frozenset(("history", *SYSTEM, "tools", "answer"))
"""Columns that may stand beside any of these."""
MAY_REPEAT = frozenset((*WHOLE, *ANSWERS, "response", "completion", "output", "solution", "text", "chosen"))
_ANSWER_NAMES = frozenset(name for names in ANSWERS.values() for name in names)
KNOWN = frozenset((*WHOLE, *ANSWERS, "chosen"))
"""Columns of which a row has at least one."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One row, read."""

    turns: list[Turn]
    tools: list[Any] | None = None
    answer: str | None = None
    """What a right reply must say."""
    ignored: list[str] = field(default_factory=list)
    """Names of columns (`source`) and keys of messages (`messages.id`) that were passed over."""
    preferred: bool = False
    """Whether the answer is the better one of two (`chosen`)."""
    rejected: list[Turn] | None = None
    """The same dialogue with the worse one, where that is asked for."""

    @property
    def messages(self) -> list[Message]:
        return [turn.message for turn in self.turns]


def to_messages(row: Mapping[str, Any], ignore_columns: Iterable[str] = ()) -> list[Message]:
    """The messages of a row in any known format, with every key that the chat template may use. Raises ValueError for others."""
    return read_dialogue(row, ignore_columns).messages


def read_dialogue(row: Mapping[str, Any], ignore_columns: Iterable[str] = (), *, preferences: bool = False) -> Dialogue:
    """A row as a dialogue. Raises ValueError for a format or a column that is not known, naming it.

    With `preferences` a row must have two answers, and both are read.
    """
    sieve = Sieve(ignore_columns)
    row = sieve.shown(row)
    given = present(row)
    form, used = _form({name: value for name, value in given.items() if name not in WHOLE} if preferences else given, row)

    def dialogue(row: Mapping[str, Any], sieve: Sieve) -> list[Turn]:
        turns = _with_history(_read_form(form, used, row, sieve), _take(given, ("history",)), sieve)
        return _with_system(turns, _take(given, SYSTEM))

    turns, rejected = dialogue(row, sieve), None
    if preferences:
        if "chosen" not in used or "rejected" not in given:
            raise ValueError(f"no chosen and rejected beside the prompt; this row has {', '.join(map(str, given))}")
        try:
            rejected = dialogue({**row, "chosen": row["rejected"]}, Sieve(ignore_columns))
        except ValueError as error:
            raise ValueError(str(error).replace("chosen", "rejected")) from error
        used = [*used, "rejected"]
    tools, answer = _tools(given), None if "answer" in used else _checkable(given)
    for name, value in given.items():
        if name not in used and name not in _BESIDE:
            _pass_over(name, value, turns, used, sieve)
    return Dialogue(turns, tools, answer, sieve.ignored, "chosen" in used, rejected)


def _form(given: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Which column the dialogue begins with, and all columns that it is read from."""
    for column in WHOLE:
        if column in given:
            return column, [column]
    asked = [name for name in ANSWERS if name in given and (name != "input" or row.get("output") is not None)]
    asked += [name for name in ANSWERS if row.get(name) == ""]
    answered = [name for name in asked if any(answer in given for answer in ANSWERS[name])]
    if asked := answered or asked:
        return asked[0], [asked[0], *(name for name in CONTEXTS.get(asked[0], ()) if name in given), _answer(asked[0], given, row)]
    if "chosen" in given:
        return "chosen", ["chosen"]
    if empty := [column for column in WHOLE if row.get(column) is not None and column in row]:
        return empty[0], empty[:1]
    raise ValueError(_unknown(given))


def _answer(question: str, given: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The one column that answers; an empty one if there is no other. `answer` beside another is what that one is checked against."""
    names = [name for name in ANSWERS[question] if name in given]
    names = [name for name in names if name != "answer"] or names
    if any(given[name] != given[names[0]] for name in names[1:]):
        raise ValueError(f"both {' and '.join(names)} hold an answer; name the one that is not to be trained on in data.ignore_columns")
    names += [name for name in ANSWERS[question] if row.get(name) is not None]
    if not names:
        others = [str(name) for name in given if name != question]
        there = f"; this row has {', '.join(others)}" if others else ""
        raise ValueError(f"no {' or '.join(ANSWERS[question])} beside {question}{there}" + (_NOT_THE_ANSWER if "answer" in given else ""))
    return names[0]


_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_NOT_THE_ANSWER = "; answer is what a reply is checked against, not what is trained on"


def _unknown(given: Mapping[str, Any]) -> str:
    known = "messages, real, conversations, prompt + response, instruction + output, question + answer, chosen"
    hint = "; of plain text nobody can tell where the prompt ends" if "text" in given else ""
    if capitals := [name for name in map(str, given) if name != name.lower().strip() and name.lower().strip() in KNOWN]:
        hint = f"; names are in lower case and without blanks: rename {capitals[0]} to {capitals[0].lower().strip()}"
    return f"none of the known columns ({known}); this row has {', '.join(map(str, given)) or 'none'}{hint}"


def _read_form(form: str, used: list[str], row: Mapping[str, Any], sieve: Sieve) -> list[Turn]:
    if form in WHOLE:
        return read_turns(row[form], form, sieve)
    if form == "chosen":
        return _chosen_alone(row["chosen"], sieve)
    asked, given = _question(form, used[1:-1], row, sieve), used[-1]
    answer = _as_turns(row[given], "assistant", given, sieve)
    if given == "chosen" and _holds(answer, asked):
        return answer  # the prompt's turns once more, perhaps behind a system text
    if asked[-1].message["role"] == "assistant":
        raise ValueError(f"{form} ends with the begin of the assistant's turn; put that text at the begin of {given}")
    if given == "chosen":
        return _after_question(form, asked, answer)
    if len(answer) > 1 and not isinstance(row[given], str) and answer[0].message["role"] != "assistant":
        raise ValueError(f"{given} begins with the role {answer[0].message['role']}; it must go on where {form} ends")
    return asked + answer


def _question(form: str, contexts: list[str], row: Mapping[str, Any], sieve: Sieve) -> list[Turn]:
    if not contexts:
        return _as_turns(row[form], "user", form, sieve)
    if len(contexts) > 1 or not all(isinstance(row[name], str) for name in (form, *contexts)):
        what = "only one of them may be there" if len(contexts) > 1 else f"{form} and {contexts[0]} must be text"
        raise ValueError(f"{' and '.join(contexts)}: {what}")
    return [Turn({"role": "user", "content": f"{row[form]}\n\n{row[contexts[0]]}"})]


def _as_turns(value: Any, role: str, column: str, sieve: Sieve) -> list[Turn]:
    if isinstance(value, list):
        return read_turns(value, column, sieve)
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text, found {type(value).__name__}")
    if _MESSAGES_AS_TEXT.match(value):
        raise ValueError(f"{column} is text that looks like a list of messages; put the whole dialogue into a column messages, as JSON")
    return [Turn({"role": role, "content": value})]


def _chosen_alone(value: Any, sieve: Sieve) -> list[Turn]:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        raise ValueError("chosen is text and there is no prompt")
    return read_turns(value, "chosen", sieve)


def _after_question(form: str, asked: list[Turn], chosen: list[Turn]) -> list[Turn]:
    """Preference rows whose chosen holds only what follows the prompt's turns."""
    text = asked[-1].message["content"]
    if len(text.split()) >= LONG_PROMPT and len(chosen) == 1 and chosen[0].message["content"].startswith(text):
        raise ValueError(f"chosen begins with the text of {form} once more; cut that off")
    if all(turn.message["role"] == "assistant" for turn in chosen):
        return asked + chosen
    raise ValueError(f"chosen is a dialogue that does not hold {form}")


def _take(given: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    there = [name for name in names if name in given]
    if len(there) > 1 and given[there[0]] != given[there[1]]:
        raise ValueError(f"{' and '.join(there)} differ")
    return (there[0], given[there[0]]) if there else ("", None)


def _with_history(turns: list[Turn], column: tuple[str, Any], sieve: Sieve) -> list[Turn]:
    """Earlier turns go in front, behind a system text; nothing is added where the dialogue has them already."""
    if column[1] is None:
        return turns
    value = from_json(column[1], "history") if isinstance(column[1], str) else column[1]
    if not isinstance(value, list):
        raise ValueError("history must be a list of [question, answer]")
    if not value:
        return turns
    paired = not isinstance(value[0], dict)
    history = [turn for pair in value for turn in _pair(pair)] if paired else read_turns(value, "history", sieve)
    begin = next((k for k, turn in enumerate(turns) if turn.message["role"] not in ("system", "developer")), len(turns))
    if turns[begin : begin + len(history)] == history and len(turns) > begin + len(history):
        return turns
    return turns[:begin] + history + turns[begin:]


def _pair(pair: Any) -> Iterator[Turn]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise ValueError("history must be a list of [question, answer], all text")
    yield Turn({"role": "user", "content": pair[0]})
    yield Turn({"role": "assistant", "content": pair[1]})


def _with_system(turns: list[Turn], column: tuple[str, Any]) -> list[Turn]:
    name, text = column
    if text is None:
        return turns
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, found {type(text).__name__}")
    others = [turn.message["content"] for turn in turns if turn.message["role"] in ("system", "developer")]
    if others and (others != [text] or turns[0].message["content"] != text):
        raise ValueError(f"column {name} beside another system turn in the dialogue; only one of them can be right")
    return turns if others else [Turn({"role": "system", "content": text}), *turns]


def _tools(given: Mapping[str, Any]) -> list[Any] | None:
    """The column tools as a list of objects; None if it is empty."""
    value = given.get("tools")
    tools = from_json(value, "tools") if isinstance(value, str) and value.strip() else value
    if is_absent(tools) or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools must be a list, found {type(tools).__name__}")
    tools = [from_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    if odd := [tool for tool in tools if not isinstance(tool, dict)]:
        raise ValueError(f"tools must be a list of objects, found {type(odd[0]).__name__}")
    return tools


def _checkable(given: Mapping[str, Any]) -> str | None:
    """The row's `answer` as text; ValueError if that is no valid Unicode, or no single value."""
    answer = given.get("answer")
    if isinstance(answer, (list, dict)):
        raise ValueError(f"answer must be text or a number, found {type(answer).__name__}")
    return None if answer is None else str(answer).encode().decode()


def _pass_over(name: str, value: Any, turns: list[Turn], used: list[str], sieve: Sieve) -> None:
    """A column that is no part of the dialogue: it may be passed over, or the row is refused."""
    if name in ("weight", "train"):
        return _check_weight(name, value, sieve)
    answers = name in _ANSWER_NAMES and turns[-1].message["role"] != "assistant"  # the dialogue has no answer at its end
    if _is_other_half(name, turns, used) or (name in MAY_REPEAT and not answers and _repeats(name, value, turns)):
        sieve.ignored.append(name)
    elif not sieve.passes(name):
        sieve.refuse(name)


def _is_other_half(name: str, turns: list[Turn], used: list[str]) -> bool:
    """Whether a column is a pair's other answer, or a pair beside a dialogue that has its answer."""
    if name == "generated":
        return "real" in used
    return name in ("chosen", "rejected") and ("chosen" in used or (turns[-1].message["role"] == "assistant" and used[0] in WHOLE))


def _check_weight(name: str, value: Any, sieve: Sieve) -> None:
    if str(value).lower() not in YES:
        why = "the row is not to be trained on" if str(value).lower() in NO else "a row is trained on (1) or not (0)"
        raise ValueError(f"{name} {value!r}: {why}")
    sieve.ignored.append(name)


def _repeats(name: str, value: Any, turns: list[Turn]) -> bool:
    """Whether a column says only what the dialogue says anyway: one of its texts, all of them in order (text), or some of its turns."""
    texts = [turn.message["content"] for turn in turns]
    if isinstance(value, str):
        return value in texts or (name == "text" and _holds_in_order(value, [part for text in texts for part in text.split("\n\n")]))
    try:
        repeated = read_turns(value, name, Sieve())
    except ValueError:
        return False
    return _holds(turns, repeated)


def _holds(turns: list[Turn], part: list[Turn]) -> bool:
    return any(turns[k : k + len(part)] == part for k in range(len(turns) - len(part) + 1))


def _holds_in_order(text: str, parts: list[str]) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True
