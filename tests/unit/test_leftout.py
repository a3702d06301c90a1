"""What a template leaves out of a dialogue: refused by name or counted, never unsaid. Templates are made by property, rows are the same."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import made

from spin_ray.chat import ChatFormat
from spin_ray.rendering import Renderer

SPECIAL = ("<|im_start|>", "<|im_end|>")
WAYS = ("written", "looked at", "dropped")
CALLS = [{"type": "function", "id": str(k), "function": {"name": f"fn{k}", "arguments": {f"key{k}": f"value{k}"}}} for k in range(2)]
TOOLS = [{"type": "function", "function": {"name": f"fn{k}", "description": f"says{k}", "parameters": {"type": "object", "properties": {
    f"key{k}": {"type": "string", "description": f"about{k}", "default": f"usual{k}"}}}}} for k in range(2)]
PROMPT = [
    {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "reasoning_content": "thought1", "tool_calls": CALLS},
    {"role": "tool", "content": "12 C", "name": "fn0"}, {"role": "tool", "content": "13 C", "name": "fn1"},
]
ANSWER = {"role": "assistant", "content": "It is warm.", "reasoning_content": "thought2"}
PARTS = {
    "name": ("call.function.name", ["fn0", "fn1"]), "arguments": ("call.function.arguments | tojson", ["key0", "key1", "value0", "value1"]),
    "tools": ("tools | tojson", ["says0", "about1", "usual1"]), "thought": ("m.reasoning_content", ["thought2"]),
    "earlier thought": ("m.reasoning_content", ["thought1"]),
}


def template(ways: dict, content: str, second_call: bool) -> str:
    def way(part: str) -> str:
        expression = PARTS[part][0]
        return {"written": "{{ " + expression + " }}", "looked at": "{% if " + expression.split(" ")[0] + " %}!{% endif %}", "dropped": ""}[ways[part]]

    calls = "{% for call in m.tool_calls" + ("" if second_call else "[:1]") + " %}" + f"<call>{way('name')} {way('arguments')}</call>" + "{% endfor %}"
    return (
        "{% if tools %}<|im_start|>tools\n" + way("tools") + "<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}{% if loop.last %}" + way("thought") + "{% else %}" + way("earlier thought") + "{% endif %}{% endif %}"
        "{{ " + content + " }}{% if m.tool_calls %}" + calls + "{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@settings(deadline=None, max_examples=120)
@given(
    st.fixed_dictionaries({part: st.sampled_from(WAYS) for part in PARTS}),
    st.sampled_from(["m.content", "m.content | trim", "m.content or ''", "m.content | replace('@', '-')"]), st.booleans(), st.booleans(),
)
def test_what_is_not_written_is_said(ways, content, second_call, another_first):
    tokenizer, notes = made("byte level", template(ways, content, second_call), special=SPECIAL, eos="<|im_end|>"), Counter()
    chat = ChatFormat(tokenizer)
    if another_first:  # of the same kind, with other texts: what is found out with it must hold for the next row
        for arguments in ({}, {"k": 3}):
            calls = [{**call, "function": {"name": "f", "arguments": arguments}} for call in CALLS]
            user = {"role": "user", "content": "call f with {} and {'key0': 'value0'}"}
            chat.encode_many([([user, {**PROMPT[1], "tool_calls": calls}, *PROMPT[2:]], ANSWER, TOOLS)])
    try:
        prompt_ids, answer_ids = chat.encode(PROMPT, ANSWER, tools=TOOLS, notes=notes)
    except ValueError as error:
        said = str(error)
        assert any(word in said for word in ("does not use", "drops")), said
        assert not all(way == "written" for way in ways.values()) or not second_call, said
        return
    text = tokenizer.decode(prompt_ids) + tokenizer.decode(answer_ids)
    for part, (_, words) in PARTS.items():
        missing = [word for word in words if word not in text]
        assert not missing or part == "earlier thought", (part, missing)
    assert ("thought1" in text) != ("reasoning_content of earlier turns left out by the template" in notes)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}EXTRA<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(extra: str, begin: str = "") -> ChatFormat:
    return ChatFormat(made("byte level", begin + CHATML.replace("EXTRA", extra), special=SPECIAL, eos="<|im_end|>"))


@pytest.mark.parametrize("extra, said", [
    ("{% for c in m.tool_calls or [] %}{{ loop.index }}{% endfor %}", "does not use tool_calls"),  # how many there are, and no more
    ("{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}", r"does not use tool_calls\[1\]\.function\.name"),
    ("{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}", r"does not use tool_calls\[0\]\.function\.arguments\.key0"),
])
def test_a_part_of_a_call_that_is_not_written_is_named(extra, said):
    with pytest.raises(ValueError, match=said):
        chat(extra).encode([*PROMPT[:1], {k: v for k, v in PROMPT[1].items() if k != "reasoning_content"}, {"role": "tool", "content": "12 C"}], "Warm.")


def test_a_name_that_is_only_tested_for_is_not_used():
    with pytest.raises(ValueError, match="does not use name"):
        chat("{% if m.name %}!{% endif %}").encode([{**PROMPT[0], "name": "Bob"}], "Warm.")


def test_a_key_whose_value_chooses_a_way_of_writing_is_used():
    final = chat("{% if m.channel == 'final' %}!{% endif %}")
    assert final.decode(final.encode(PROMPT[:1], {**ANSWER, "reasoning_content": "", "channel": "final"})[1]) == "It is warm.!"


def test_parts_of_a_tool_s_description_that_are_left_out_are_counted_and_a_name_is_refused():
    words = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}"
    notes = Counter()
    chat("", words).encode(PROMPT[:1], "Warm.", tools=TOOLS, notes=notes)
    assert notes == {"default of tools left out by the template": 1, "description of tools left out by the template": 1}
    with pytest.raises(ValueError, match=r"does not use tools\[0\]\.function\.name"):
        chat("", words.replace("t.function.name", "'tool'")).encode(PROMPT[:1], "Warm.", tools=TOOLS)


def test_rows_of_one_shape_are_looked_at_once():
    seen = []

    def counting(render):
        return lambda *args, **options: seen.append(1) or render(*args, **options)

    subject = chat("{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}")
    subject.template._left_out._renderer = SimpleNamespace(
        whole=counting(subject.template.renderer.whole), given=counting(subject.template.renderer.given), spec=Renderer
    )
    prompt = [*PROMPT[:1], {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "12 C"}]
    subject.encode(prompt, "Warm.")
    first = len(seen)
    subject.encode([{"role": "user", "content": "Rain?"}, *prompt[1:]], "No.")
    assert 0 < first == len(seen)
