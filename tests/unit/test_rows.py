"""What a row of any format becomes: every column and every key used, ignored by name, or refused by name."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.data.choice import choose
from spin_ray.data.columns import HARMLESS
from spin_ray.data.rows import read_dialogue, to_messages


def user(text):
    return {"role": "user", "content": text}


def says(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def system(text):
    return {"role": "system", "content": text}


USER, ASSISTANT = user("Hi"), says("Hello")
CALL = {"type": "function", "function": {"name": "w", "arguments": {"c": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
PIRATE = system("Talk like a pirate.")

DIALOGUES = {
    "alpaca_history": (
        {"instruction": "And the last word?", "input": "", "output": "pear.", "system": "Answer in one word.",
         "history": [["What is the first word of: apple, pear?", "apple."]]},
        [system("Answer in one word."), user("What is the first word of: apple, pear?"), says("apple."), user("And the last word?"), says("pear.")],
    ),
    "prompt_system_col": ({"system": "Talk like a pirate.", "prompt": "Hi", "response": "Ahoy"}, [PIRATE, USER, says("Ahoy")]),
    "sharegpt_system_col": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}], "system": "Talk like a pirate.", "tools": "[]"},
        [PIRATE, USER, says("Ahoy")],
    ),
    "messages_system_col": ({"messages": [USER, ASSISTANT], "system": "Talk like a pirate."}, [PIRATE, USER, ASSISTANT]),
    "the same system text twice": ({"messages": [PIRATE, USER, ASSISTANT], "system": "Talk like a pirate."}, [PIRATE, USER, ASSISTANT]),
    "open orca": ({"id": "7", "system_prompt": "Talk like a pirate.", "question": "Hi", "response": "Ahoy"}, [PIRATE, USER, says("Ahoy")]),
    "history of messages": ({"prompt": "Bye", "response": "Bye", "history": [USER, ASSISTANT]}, [USER, ASSISTANT, user("Bye"), says("Bye")]),
    "history as text": ({"prompt": "Bye", "response": "Bye", "history": '[["Hi", "Hello"]]'}, [USER, ASSISTANT, user("Bye"), says("Bye")]),
    "history within": ({"messages": [PIRATE, USER, ASSISTANT, user("Bye"), says("Bye")], "history": [["Hi", "Hello"]]},
                       [PIRATE, USER, ASSISTANT, user("Bye"), says("Bye")]),
    "history behind system": ({"messages": [PIRATE, user("Bye"), says("Bye")], "history": [["Hi", "Hello"]]},
                              [PIRATE, USER, ASSISTANT, user("Bye"), says("Bye")]),
    "tools_col": (
        {"messages": [user("Weather?"), says("", tool_calls=[CALL]), {"role": "tool", "name": "w", "content": "12 C"}, says("It is 12 C.")], "tools": TOOLS},
        [user("Weather?"), says("", tool_calls=[CALL]), {"role": "tool", "name": "w", "content": "12 C"}, says("It is 12 C.")],
    ),
    "tools_null_content": (
        {"messages": [user("Weather?"), says(None, tool_calls=[{"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}]),
                      {"role": "tool", "tool_call_id": "1", "content": "12 C"}, says("It is 12 C.")]},
        [user("Weather?"), says("", tool_calls=[{"id": "1", "type": "function", "function": {"name": "w", "arguments": {}}}]),
         {"role": "tool", "tool_call_id": "1", "content": "12 C"}, says("It is 12 C.")],
    ),
    "sharegpt tool": (
        {"conversations": [{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": '{"name": "w", "arguments": {"c": "Oslo"}}'},
                           {"from": "observation", "value": "12 C"}, {"from": "gpt", "value": "It is 12 C."}]},
        [user("Weather?"), says("", tool_calls=[CALL]), {"role": "tool", "content": "12 C"}, says("It is 12 C.")],
    ),
    "sharegpt tools at once": (
        {"conversations": [{"from": "human", "value": "Weather?"},
                           {"from": "function_call", "value": [{"name": "w", "arguments": '{"c": "Oslo"}'}, {"name": "w", "parameters": {"c": "Rome"}, "id": "2"}]},
                           {"from": "tool_response", "value": "12 C"}, {"from": "gpt", "value": "It is 12 C."}]},
        [user("Weather?"), says("", tool_calls=[CALL, {"id": "2", "type": "function", "function": {"name": "w", "arguments": {"c": "Rome"}}}]),
         {"role": "tool", "content": "12 C"}, says("It is 12 C.")],
    ),
    "sharegpt with role and content": ({"conversations": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]}, [USER, ASSISTANT]),
    "sharegpt of gemma": ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello"}]}, [USER, ASSISTANT]),
    "slim orca": (
        {"conversations": [{"from": "system", "value": "S", "weight": None}, {"from": "human", "value": "Hi", "weight": 0.0}, {"from": "gpt", "value": "Hello", "weight": 1.0}]},
        [system("S"), USER, ASSISTANT],
    ),
    "reasoning_content": ({"messages": [user("2+2?"), says("4", reasoning_content="two and two")]}, [user("2+2?"), says("4", reasoning_content="two and two")]),
    "content_parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]},
        [USER, ASSISTANT],
    ),
    "several content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "input_text", "text": "i", "image_url": None}]}, ASSISTANT]}, [USER, ASSISTANT],
    ),
    "pref_chosen": ({"prompt": "Hi", "chosen": [USER, says("good")], "rejected": [USER, says("bad")]}, [USER, says("good")]),
    "chosen without the prompt": ({"prompt": [PIRATE, USER], "chosen": [says("good")], "rejected": [says("bad")]}, [PIRATE, USER, says("good")]),
    "chosen is text": ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, [USER, says("good")]),
    "chosen behind a system text": ({"prompt": "Hi", "chosen": [PIRATE, USER, says("good")], "rejected": []}, [PIRATE, USER, says("good")]),
    "chosen alone": ({"chosen": [USER, says("good")], "rejected": [USER, says("bad")], "score_chosen": 7.5}, [USER, says("good")]),
    "orca pairs": ({"system": "Talk like a pirate.", "question": "Hi", "chosen": "Ahoy", "rejected": "Hello"}, [PIRATE, USER, says("Ahoy")]),
    "ultrafeedback": ({"prompt": "Hi", "prompt_id": "a", "messages": [USER, says("good")], "chosen": [USER, says("good")], "rejected": [USER, says("bad")],
                       "score_chosen": 7.5, "score_rejected": 2.0}, [USER, says("good")]),
    "dolly": ({"instruction": "Hi", "context": "ctx", "response": "Hello", "category": "open_qa"}, [user("Hi\n\nctx"), ASSISTANT]),
    "stanford alpaca": ({"instruction": "Add", "input": "1 2", "output": "3", "text": "Below is ...\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3"},
                        [user("Add\n\n1 2"), says("3")]),
    "question and answer": ({"question": "2+2?", "answer": "4"}, [user("2+2?"), says("4")]),
    "query and response": ({"query": "2+2?", "response": "4"}, [user("2+2?"), says("4")]),
    "problem and solution": ({"problem": "2+2?", "solution": "It is 4", "answer": "4"}, [user("2+2?"), says("It is 4")]),
    "input and output": ({"input": "Hi", "output": "Hello"}, [USER, ASSISTANT]),
    "an instruction that is empty": ({"instruction": "", "input": "Hi", "output": "Hello"}, [USER, ASSISTANT]),
    "an empty completion beside the response": ({"prompt": "Hi", "response": "Hello", "completion": ""}, [USER, ASSISTANT]),
    "an empty prompt": ({"prompt": "", "response": "Hello"}, [user(""), ASSISTANT]),
    "messages as text": ({"messages": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),
    "wildchat": ({"conversation": [{"content": "Hi", "role": "user", "language": "English", "timestamp": None, "turn_identifier": 1},
                                   {"content": "Hello", "role": "assistant", "toxic": False}], "turn": 1, "model": "gpt-4", "redacted": False}, [USER, ASSISTANT]),
    "ultrachat": ({"prompt": "Hi", "prompt_id": "a", "messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "magpie": ({"uuid": "a", "instruction": "Hi", "response": "Hello", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [USER, ASSISTANT]),
    "openai's functions": (
        {"messages": [user("Weather?"), {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": '{"c": "Oslo"}'}},
                      {"role": "function", "name": "w", "content": "12 C"}, says("It is 12 C.")]},
        [user("Weather?"), says("", tool_calls=[CALL]), {"role": "function", "name": "w", "content": "12 C"}, says("It is 12 C.")],
    ),
    "a dictionary of lists": ({"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}}, [USER, ASSISTANT]),
    "roles in capitals": ({"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Hello"}]}, [USER, ASSISTANT]),
    "chatgpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]}, [USER, ASSISTANT]),
    "the same exchange before": ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]]}, [USER, ASSISTANT, USER, ASSISTANT]),
    "two columns with one answer": ({"prompt": "Hi", "response": "Hello", "completion": "Hello"}, [USER, ASSISTANT]),
    "a chosen that begins as a short prompt": ({"prompt": "Hi", "chosen": "Hi there", "rejected": "No"}, [USER, says("Hi there")]),
    "a developer": ({"messages": [{"role": "developer", "content": "Be brief."}, USER, ASSISTANT]}, [{"role": "developer", "content": "Be brief."}, USER, ASSISTANT]),
}


@pytest.mark.parametrize("row, messages", DIALOGUES.values(), ids=DIALOGUES)
def test_a_row_becomes_these_messages(row, messages):
    assert to_messages(row) == messages


@pytest.mark.parametrize("row, complaint", [
    ({"messages": [system("Be kind."), USER, ASSISTANT], "system": "Talk like a pirate."}, "column system beside another system turn in the dialogue"),
    ({"messages": [USER, PIRATE, ASSISTANT], "system": "Talk like a pirate."}, "column system beside another system turn"),
    ({"messages": [{"role": "developer", "content": "Be kind."}, USER, ASSISTANT], "system": "S"}, "column system beside another system turn"),
    ({"prompt": "Hi", "response": "Hello", "system": "a", "system_prompt": "b"}, "system and system_prompt differ"),
    ({"prompt": [USER, says("Roses are")], "completion": " red"}, "prompt ends with the begin of the assistant's turn; put that text at the begin of completion"),
    ({"prompt": [USER, says("Roses")], "chosen": [says(" red")], "rejected": []}, "prompt ends with the begin of the assistant's turn"),
    ({"prompt": "\n\nHuman: what is it that you say to me?\n\nAssistant:", "chosen": "\n\nHuman: what is it that you say to me?\n\nAssistant: Hi", "rejected": "x"},
     "chosen begins with the text of prompt once more; cut that off"),
    ({"messages": [USER, ASSISTANT, USER], "response": "Hello"}, "column response is neither a known part"),
    ({"messages": [USER, says("Hello", function_call={"name": "w"}, tool_calls=[CALL])]}, "function_call beside tool_calls"),
    ({"messages": [{**USER, "function_call": {"name": "w"}}, ASSISTANT]}, "function_call beside the role user"),
    ({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}, "messages is text that is not valid JSON: an object has the key content twice"),
    ({"conversations": {"from": ["human", "gpt"], "value": ["Hi"]}}, "conversations must be a list of messages"),
    ({"conversations": {"from": ["human"], "value": "Hi"}}, "conversations must be a list of messages; value in it is no list"),
    ({"conversations": [{"from": "bing", "value": "Hi"}]}, "unknown speaker 'bing'; known are system, developer, user, human"),
    ({"Instruction": "Hi", "Output": "Hello"}, "names are in lower case and without blanks: rename Instruction to instruction"),
    ({"query": "Hi", "reply": "Hello"}, "no response or answer or chosen beside query; this row has reply"),
    ({"prompt": "Hi", "response": "Hello", "picture_url": "x"}, "column picture_url is neither"),
    ({"prompt": "Hi", "response": "Hello", "a\nb": "x"}, r"column 'a\nb' is neither"),
    ({"prompt": "Hi", "response": "Hello", "system": 3}, "system must be text, found int"),
    ({"prompt": "Hi", "response": "Hello", "history": [["Hi"]]}, "history must be a list of [question, answer], all text"),
    ({"prompt": "Hi", "response": "Hello", "history": "Hi"}, "history is text that is not valid JSON"),
    ({"prompt": "Hi", "response": "Hello", "tools": {"name": "w"}}, "tools must be a list, found dict"),
    ({"prompt": "Hi", "response": "Hello", "tools": "w(c)"}, "tools is text that is not valid JSON"),
    ({"prompt": "Hi", "response": "Hello", "tools": ["3"]}, "tools must be a list of objects, found int"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "12"}, {"from": "gpt", "value": "12 C"}]},
     "a call of a tool (function_call, tool_calls) without a name"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "w(Oslo)"}]}, "function_call is text that is not valid JSON"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": {"name": "w", "when": 3}}]}, "function_call with when"),
    ({"messages": [USER, says("", tool_calls=[{"function": {"name": "w", "arguments": "3"}}])]}, "the arguments of w must be an object, found int"),
    ({"messages": [USER, says("Hello", weight=0.5)]}, "weight 0.5: a turn is trained on (1) or not (0)"),
    ({"messages": [USER, ASSISTANT], "weight": 0}, "weight 0: the row is not to be trained on"),
    ({"messages": [USER, ASSISTANT], "train": False}, "train False: the row is not to be trained on"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]}, "a content part of type image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"a": 1}}]}, ASSISTANT]}, "a text part with cache_control"),
    ({"messages": [{"role": "user", "content": {"text": "Hi"}}, ASSISTANT]}, "needs a role and a content"),
    ({"messages": [{"role": "bot", "content": "Hi"}]}, "unknown role 'bot'"),
    ({"messages": [{"role": "observation", "content": "Hi"}]}, "unknown role 'observation'"),
    ({"dialog": ["Hi", "Hello"]}, "every message in dialog needs a role and a content"),
    ({"text": "### Human: Hi ### Assistant: Hello"}, "this row has text; of plain text nobody can tell where the prompt ends"),
    ({"prompt": "Hi", "completion": "Hello", "label": False}, "column label says whether an answer is good or bad"),
    ({"prompt": "Hi", "completion": "Hello", "label": True}, "column label says whether an answer is good or bad"),
    ({"prompt": "Hi", "response": "Hello", "rejected": "bad"}, "column rejected is the worse of two answers"),
    ({"prompt": "Hi", "rejected": "bad"}, "no response or completion or chosen beside prompt"),
    ({"prompt": "Bye", "instruction": "Hi", "output": "Hello"}, "column prompt is neither"),
    ({"input": "Hi", "output": "Hello", "query": "Bye"}, "column query is neither"),
    ({"prompt": "Hi", "response": "Hello", "generated": "bad"}, "column generated is an opponent's answer"),
    ({"prompt": "Hi", "response": "Hello", "completion": "Hallo"}, "both response and completion hold an answer"),
    ({"prompt": "Hi", "answer": "4"}, "answer is what a reply is checked against, not what is trained on"),
    ({"prompt": "Bye", "chosen": [USER, ASSISTANT]}, "chosen is a dialogue that does not hold prompt"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello"}, "chosen is text and there is no prompt"),
    ({"messages": [USER, ASSISTANT, user("Bye")], "chosen": says("good"), "rejected": says("bad")}, "column chosen"),
    ({"messages": [USER, ASSISTANT], "prompt": "Bye"}, "column prompt is neither"),
    ({"messages": [USER, ASSISTANT], "conversations": [USER, says("Hallo")]}, "column conversations is neither"),
    ({"instruction": "Add", "input": "1", "context": "2", "output": "3"}, "input and context: only one of them may be there"),
    ({"instruction": "Add", "input": 3, "output": "3"}, "instruction and input must be text"),
    ({"instruction": "Add", "output": "3", "text": "something else"}, "column text is neither"),
    ({"prompt": json.dumps([USER]), "response": "Hello"}, "prompt is text that looks like a list of messages"),
    ({"prompt": "Hi", "response": "Hello", "images": ["a.png"]}, "column images holds pictures"),
    ({"prompt": "Hi", "response": "Hello", "input_ids": [1, 2]}, "column input_ids is neither"),
    ({"prompt": "Hi", "response": "Hello", "documents": ["a"]}, "column documents is neither a known part of a dialogue nor known to be harmless; name it in data.ignore_columns"),
    ({"prompt": "Hi", "response": "Hello", "answer": ["4", "5"]}, "answer must be text or a number, found list"),
    ({"messages": "[{'role': 'user', 'content': 'Hi'}]"}, "messages is text that is not valid JSON"),
])
def test_what_is_refused_and_how(row, complaint):
    with pytest.raises(ValueError) as caught:
        to_messages(row)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("row, ignored", [
    ({"prompt": "Hi", "response": "Hello", "prompt_id": 3, "source": "x", "score": 0.0, "num_tokens": 7, "url": "u", "": "0"},
     ["prompt_id", "source", "score", "num_tokens", "url", "(no name)"]),
    ({"real": [USER, ASSISTANT], "generated": [USER, says("no")]}, ["generated"]),
    ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, ["rejected"]),
    ({"messages": [USER, ASSISTANT], "prompt": "Hi"}, ["prompt"]),
    ({"messages": [{**USER, "id": "a", "weight": None}, says("Hello", timestamp=3)]}, ["messages.id", "messages.timestamp"]),
    ({"messages": [USER, ASSISTANT], "weight": 1}, ["weight"]),
    ({"prompt": "Hi", "response": "Hello", "source": None, "documents": [], "images": None, "label": ""}, []),
])
def test_what_is_passed_over_is_named(row, ignored):
    assert read_dialogue(row).ignored == ignored


def test_columns_that_the_user_ignores_are_out_of_the_dialogue_too():
    row = {"prompt": "Hi", "response": "Hello", "completion": "Hallo", "system": "S", "documents": ["a"]}
    dialogue = read_dialogue(row, ["completion", "system", "documents"])
    assert dialogue.messages == [USER, ASSISTANT] and dialogue.ignored == ["completion", "system", "documents"]
    assert read_dialogue({"messages": [USER, says("Hello", mood="glad")]}, ["mood"]).messages == [USER, ASSISTANT]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]], ids=["list", "text", "list of texts"])
def test_tools(tools):
    assert read_dialogue({"messages": [USER, ASSISTANT], "tools": tools}).tools == TOOLS


def test_the_checkable_answer():
    assert read_dialogue({"messages": [USER, ASSISTANT], "answer": 4}).answer == "4"
    assert read_dialogue({"question": "Hi", "answer": "Hello"}).answer is None
    assert read_dialogue({"question": "Hi", "response": "It is 4", "answer": "4"}).answer == "4"
    assert read_dialogue({"prompt": "Hi", "response": "Hello", "answer": ""}).answer is None


def chosen(which, *messages):
    made = choose(read_dialogue({"messages": list(messages)}), which)
    return [messages[k]["content"] for k in made.places], dict(made.skipped)


@pytest.mark.parametrize("which, expected", [
    ("all", (["Good answer"], {"turns_left_out_by_weight": 1})), ("last", (["Good answer"], {})),
    ("first", (["Good answer"], {"turns_left_out_by_weight": 1})),
])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}], ids=str)
def test_openai_weight(which, expected, mark):
    assert chosen(which, USER, says("Bad answer", **mark), user("Again"), says("Good answer", weight=1)) == expected


def test_turns_behind_the_last_answer_are_counted_and_one_that_opens_the_dialogue_is_no_answer():
    assert chosen("last", USER, says("12"), USER, USER) == (["12"], {"turns_behind_the_last_answer": 2})
    assert chosen("all", USER, says("12"), USER, says("13"), USER) == (["12", "13"], {"turns_behind_the_last_answer": 1})
    assert chosen("first", USER, says("12"), USER, says("13"), USER) == (["12"], {})
    assert chosen("all", says("Welcome"), USER, says("12")) == (["12"], {"turns_that_open_the_dialogue": 1})
    assert chosen("first", says("Welcome"), USER, says("12")) == (["12"], {"turns_that_open_the_dialogue": 1})
    assert chosen("last", says("Welcome"), USER, says("12")) == (["12"], {})
    with pytest.raises(ValueError, match="the dialogue begins with the assistant"):
        chosen("last", says("Welcome"), USER)


@pytest.mark.parametrize("names", [["completion"], ["prompt"], ["prompt", "completion"]])
def test_a_column_that_is_to_be_ignored_is_not_read(names):
    with pytest.raises(ValueError, match=r"none of the known columns|no response or completion or chosen beside prompt"):
        to_messages({"prompt": "Hi", "completion": "Hello"}, names)
    with pytest.raises(ValueError, match="a role and a content"):
        to_messages({"messages": [USER, ASSISTANT]}, ["content"])


def test_a_turn_that_only_calls_a_tool_is_no_answer_and_with_text_it_is():
    result = {"role": "tool", "content": "12 C"}
    calls, talks = says("", tool_calls=[CALL]), says("Let me see.", tool_calls=[CALL])
    assert chosen("all", USER, calls, result, says("12")) == (["12"], {"turns_that_only_call_tools": 1})
    assert chosen("first", USER, calls, result, says("12")) == (["12"], {"turns_that_only_call_tools": 1})
    assert chosen("all", USER, talks, result, says("12")) == (["Let me see.", "12"], {})
    assert chosen("last", USER, says("12"), USER, calls) == (["12"], {"turns_that_only_call_tools": 1, "turns_behind_the_last_answer": 1})
    with pytest.raises(ValueError, match="no assistant answer to train on: turns that only call tools 1"):
        chosen("last", USER, calls)


ANY = settings(deadline=None)
NAME = st.text(st.characters(categories=["L", "N"], include_characters="_- ."), min_size=1, max_size=12) | st.sampled_from(
    ["systm", "context", "input", "tool", "function", "functions", "label", "labels", "reward_model", "messages2", "thinking", "query", "weights", "answers", "images"]
)
VALUE = st.text(min_size=1, max_size=5) | st.integers() | st.booleans() | st.lists(st.integers(), min_size=1, max_size=2) | st.dictionaries(st.text(max_size=2), st.integers(), min_size=1)
ROWS = [row for row, _ in DIALOGUES.values()]


@ANY
@given(st.sampled_from(ROWS), NAME, VALUE)
def test_an_unknown_column_is_refused_or_named_or_used(row, name, value):
    """Never dropped in silence: it changes the dialogue, is listed as ignored, or is refused by its name."""
    before = read_dialogue(row)
    if name in row:
        return
    try:
        after = read_dialogue({**row, name: value})
    except ValueError as error:
        assert any(column in str(error) for column in (name, *row))  # beside a query, it may be the row's problem that is one too many
    else:
        assert name in after.ignored or (after.messages, after.tools, after.answer) != (before.messages, before.tools, before.answer)


def lists_of_messages(row):
    return [(column, value) for column, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict) and column not in ("tools", "rejected", "chosen")]


@ANY
@given(st.sampled_from([row for row in ROWS if lists_of_messages(row)]), st.data(), NAME, VALUE)
def test_an_unknown_key_of_a_message_is_refused_or_named_or_kept(row, data, name, value):
    """What is kept is for the chat format, which refuses a key that the template does not use."""
    column, turns = data.draw(st.sampled_from(lists_of_messages(row)))
    place = data.draw(st.integers(0, len(turns) - 1))
    if name in turns[place] or name in ("from", "value", "role", "content"):
        return
    changed = copy.deepcopy(row)
    changed[column][place][name] = value
    try:
        dialogue = read_dialogue(changed)
    except ValueError:
        return  # also because the key makes two columns differ that said the same
    assert f"{column}.{name}" in dialogue.ignored or column in dialogue.ignored or any(name in message for message in dialogue.messages)




@pytest.mark.parametrize("row, messages", DIALOGUES.values(), ids=DIALOGUES)
def test_keys_that_arrow_has_filled_with_none_change_nothing(row, messages):
    assert read_dialogue({**dict.fromkeys(["images", "label", "documents", "history"]), **row}).messages == messages
    turns = {column: [{"of_another_row": None, "tool_calls": None, **turn} for turn in value] for column, value in lists_of_messages(row)}
    assert read_dialogue({**row, **turns}) == read_dialogue(row)


@ANY
@given(st.sampled_from(sorted(HARMLESS)), VALUE)
def test_harmless_names_never_change_a_dialogue(name, value):
    dialogue = read_dialogue({"prompt": "Hi", "response": "Hello", name: value})
    assert dialogue.messages == [USER, ASSISTANT] and dialogue.ignored == [name]
