"""A message of any known form as a role, a content, and every other key for the chat template.

| in the row | becomes |
|---|---|
| role + content, or ShareGPT's from + value | role + content; human is the user, gpt and model are the assistant |
| content as a list of text parts | their texts, one after another; any other part is refused by its type |
| weight 0, or train: false | a turn that is context only; any other weight than 0 and 1 is refused |
| function_call (a speaker of ShareGPT, a key of OpenAI's old format) | an assistant turn with tool_calls |
| observation, tool, tool_response, function_response (ShareGPT) | a tool turn |
| arguments of a tool call as JSON text (OpenAI) | the object, as templates expect them |
| id, timestamp, ... (columns.py) | left out and counted |
| any other key | stays: the chat format uses it or refuses it |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from spin_ray.chat import Message
from spin_ray.data.columns import Sieve, is_absent, present

ROLES = {"system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "model": "assistant", "tool": "tool", "function": "function"}
SPEAKERS = ROLES | {"chatgpt": "assistant"} | dict.fromkeys(("observation", "tool_response", "function_response"), "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")


@dataclass(frozen=True, slots=True)
class Turn:
    message: Message
    trains: bool = True
    """False: only context, whoever speaks."""


def read_turns(value: Any, column: str, sieve: Sieve) -> list[Turn]:
    """The turns of a list of messages, or of its JSON text. Raises ValueError for what is none."""
    turns = from_json(value, column) if isinstance(value, str) else value
    if isinstance(turns, dict) and len({len(items) if isinstance(items, list) else None for items in turns.values()} - {None}) == 1:
        turns = _turned(turns, column)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{column} must be a list of messages that is not empty")
    return [_turn(turn, column, sieve) for turn in turns]


def _turned(lists: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """A dictionary of lists, as `datasets` once wrote lists of messages, as such a list."""
    if odd := [name for name, items in lists.items() if not isinstance(items, list)]:
        raise ValueError(f"{column} must be a list of messages; {odd[0]} in it is no list")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json`: an object; ValueError if it has a key twice, of which `json` would keep the last one."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {next(name for name in names if names.count(name) > 1)} twice")
    return made


def from_json(text: str, column: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{column} is text that is not valid JSON: {error}") from error


def _turn(turn: Any, column: str, sieve: Sieve) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"every message in {column} needs a role and a content, both text")
    turn = sieve.shown(turn, f"{column}.")
    given = present(turn)
    sharegpt = "from" in given and "role" not in given
    speaker, said = ("from", "value") if sharegpt else ("role", "content")
    if sharegpt and given["from"] == "function_call":
        message: Message = {"role": "assistant", "content": "", "tool_calls": _called(given.pop("value", None))}
    else:
        message = {"role": _role(given.get(speaker), column, sharegpt), "content": ""}
        if not is_absent(content := given.pop(said, turn.get(said))):
            message["content"] = _text(content, column)
        elif content is None and not {"tool_calls", "function_call"} & given.keys():
            raise ValueError(f"every message in {column} needs a role and a content, both text")
    given.pop(speaker)
    trains = all([_trains(name, given.pop(name)) for name in ("weight", "train") if name in given])
    for name, item in given.items():
        if not sieve.passes(name, f"{column}."):
            message[name] = _tool_calls(item) if name == "tool_calls" else item
    if "function_call" in message:
        if "tool_calls" in message or message["role"] != "assistant":
            raise ValueError(f"{column}: function_call beside {'tool_calls' if 'tool_calls' in message else 'the role ' + message['role']}")
        message["tool_calls"] = _called(message.pop("function_call"))
    return Turn(message, trains)


def _role(name: Any, column: str, sharegpt: bool) -> str:
    known = SPEAKERS if sharegpt else ROLES
    if isinstance(name, str) and name.lower() in known:
        return known[name.lower()]
    if sharegpt:
        raise ValueError(f"{column}: unknown speaker {name!r}; known are {', '.join(known)}, function_call")
    if not isinstance(name, str):
        raise ValueError(f"every message in {column} needs a role and a content, both text")
    name.encode()  # half a surrogate pair has its own complaint
    raise ValueError(f"{column}: unknown role {name!r}; known are {', '.join(ROLES)}")


def _text(content: Any, column: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"every message in {column} needs a role and a content, both text")
    return "".join(_part(part, column) for part in content)


def _part(part: Any, column: str) -> str:
    given = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = given.pop("type", None)
    if kind not in TEXT_PARTS:
        raise ValueError(f"{column}: a content part of type {kind}; only text can be trained on")
    text = given.pop("text", None)
    if given or not isinstance(text, str):
        raise ValueError(f"{column}: a text part with {', '.join(given) or 'no text'}; a part has a type and a text")
    return text


def _trains(name: str, value: Any) -> bool:
    """Whether a weight is 1; ValueError unless it is 0 or 1."""
    said = str(value).lower()
    if said not in YES + NO:
        raise ValueError(f"{name} {value!r}: a turn is trained on (1) or not (0); there is nothing between")
    return said in YES


def _called(value: Any) -> list[dict[str, Any]]:
    """ShareGPT's function_call, an object or a list of them, also as JSON text, as tool_calls."""
    calls = from_json(value, "function_call") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise ValueError("function_call must be an object with name and arguments, or a list of them")
    if unknown := sorted({str(name) for call in calls for name in call} - {"name", "arguments", "parameters", "id"}):
        raise ValueError(f"function_call with {unknown[0]}; known are name and arguments")
    if any("arguments" in call and "parameters" in call for call in calls):
        raise ValueError("function_call with both arguments and parameters")
    return _tool_calls([_openai_call(call) for call in calls])


def _openai_call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call.get("name"), "arguments": call.get("arguments", call.get("parameters"))}
    identity = {} if is_absent(call.get("id")) else {"id": call["id"]}
    return {**identity, "type": "function", "function": function}


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """tool_calls with every function's name checked and its arguments as an object."""
    calls = from_json(value, "tool_calls") if isinstance(value, str) else value
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls must be a list, found {type(calls).__name__}")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f"a tool call must be an object, found {type(call).__name__}")
    call = {name: value for name, value in call.items() if value is not None}
    wrapped = call.get("function")
    function = {name: value for name, value in wrapped.items() if value is not None} if isinstance(wrapped, dict) else call
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("a call of a tool (function_call, tool_calls) without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = from_json(arguments or "{}", f"the arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {function['name']} must be an object, found {type(arguments).__name__}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if isinstance(wrapped, dict) else function
