"""Templates that people have, with the right ids written out by hand: where an answer begins and ends, and what must not go missing."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import trl
from made_tokenizers import made
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spin_ray.chat import ChatFormat
from spin_ray.errors import BadInput
from spin_ray.tokenizer import read_template
from spin_ray.tokenproof import prove_tokens

WORDS = "<unk> <s> </s> \n _ user assistant system Hi Hello See you Be brief. <think> </think> pear [INST] [/INST] Bye tool 12 C".split(" ")
ID = {**{word.replace("_", " "): k for k, word in enumerate(WORDS)}}
ADDED = {"<|im_start|>": 100, "<|im_end|>": 101, "<|endoftext|>": 102, "<|user|>": 103, "<|assistant|>": 104, "<|end|>": 105, "<turn_end>": 106, "<tool_call>": 107}
NL, SP = ID["\n"], ID[" "]


def tokenizer(template: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """One token a word, one a blank; ids as in ID and ADDED, <turn_end> and <tool_call> no special tokens."""
    filler = {f"filler{k}": k for k in range(len(ID), 100)}
    words = Tokenizer(models.WordLevel({**ID, **filler, **ADDED}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\[/?INST\]|</?think>"), "isolated")
    words.decoder = decoders.Fuse()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, bos_token="<s>", unk_token="<unk>")
    plain = ("<turn_end>", "<tool_call>")
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in ADDED if t not in plain], special_tokens=True)
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    assert tok.convert_tokens_to_ids(list(ADDED)) == list(ADDED.values())
    tok.chat_template = template
    return tok


def user(text="Hi"):
    return {"role": "user", "content": text}


def assistant(text="Hello", **keys):
    return {"role": "assistant", "content": text, **keys}


SYSTEM = {"role": "system", "content": "Be brief."}
NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CHATML = NO_PROMPT + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN_END = CHATML.replace("<|im_end|>", "<turn_end>")
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is defined and m.reasoning_content is not none %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in m.content %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = [100, 5, NL, 8, 101, NL, 100, 6, NL]
"""<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"""
GOLDEN = {
    "T2: no generation prompt, the header belongs to the prompt": (NO_PROMPT, "<|endoftext|>", [user()], "See you", ASKED, [10, SP, 11, 101], {101, 102}),
    "with one, the same": (CHATML, "<|endoftext|>", [user()], "See you", ASKED, [10, SP, 11, 101], {101, 102}),
    "T3: the end is an added token that is not special": (
        TURN_END, "<|endoftext|>", [user()], "See you", [100, 5, NL, 8, 106, NL, 100, 6, NL], [10, SP, 11, 106], {106, 102}),
    "T5: EOS after the whole dialogue": (PHI3, "<|endoftext|>", [user()], "See you", [103, NL, 8, 105, NL, 104, NL], [10, SP, 11, 105], {105, 102}),
    "T5: with history": (
        PHI3, "<|endoftext|>", [user(), assistant(), user("Bye")], "See you",
        [103, NL, 8, 105, NL, 104, NL, 9, 105, NL, 103, NL, 19, 105, NL, 104, NL], [10, SP, 11, 105], {105, 102}),
    "T6: the system text stands before the last user turn only": (
        MISTRAL3, "</s>", [SYSTEM, user()], "See you", [1, 17, SP, 12, SP, 13, NL, NL, 8, 18], [SP, 10, SP, 11, 2], {2}),
    "T6: with history": (
        MISTRAL3, "</s>", [SYSTEM, user(), assistant(), user("Bye")], "See you",
        [1, 17, SP, 8, 18, SP, 9, 2, 17, SP, 12, SP, 13, NL, NL, 19, 18], [SP, 10, SP, 11, 2], {2}),
    "T6: without a system text": (MISTRAL3, "</s>", [user()], "See you", [1, 17, SP, 8, 18], [SP, 10, SP, 11, 2], {2}),
    "R1: no thought, nothing is dropped": (R1, "</s>", [user()], "See you", [103, 8, 104], [10, SP, 11, 2], {2}),
    "Qwen3: the empty thought is the answer's": (QWEN3, "<|im_end|>", [user()], "See", ASKED, [14, NL, NL, 15, NL, NL, 10, 101], {101}),
    "Qwen3: so is one in the text": (
        QWEN3, "<|im_end|>", [user()], "<think>\npear\n</think>\n\nSee", ASKED, [14, NL, 16, NL, 15, NL, NL, 10, 101], {101}),
    "Qwen3: so is one in reasoning_content": (
        QWEN3, "<|im_end|>", [user()], assistant("See", reasoning_content="pear"), ASKED, [14, NL, 16, NL, 15, NL, NL, 10, 101], {101}),
    "no end in the template": (
        "{% for m in messages %}{{ m.role + '\n' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
        "</s>", [user()], "See", [5, NL, 8, NL, 6, NL], [10, NL, 2], {2}),
    "an end after earlier turns only": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}",
        "<|endoftext|>", [user()], "See you", ASKED, [10, SP, 11, 101], {101, 102}),
    "words before EOS": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + ' Bye' + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "</s>", [user()], "See", [103, 8, SP, 19, 2, 104], [10, SP, 19, 2], {2}),
    "several tokens, EOS among them, after every turn": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|><|endoftext|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "<|endoftext|>", [user()], "See", [103, 8, 105, 102, 104], [10, 105, 102], {102}),
    "the generation prompt begins the thought": (
        CHATML.replace("assistant\n'", "assistant\n<think>\n'").replace("+ m['content']", "+ ('<think>\nHi\n</think>\n' if m.role == 'assistant' and '<think>' not in m.content else '') + m.content"),
        "<|im_end|>", [user()], "<think>\npear\n</think>\nSee", [*ASKED, 14, NL], [16, NL, 15, NL, 10, 101], {101}),
    "contents as parts": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "</s>", [user()], "See you", [103, 8, 105, 104], [10, SP, 11, 105], {105, 2}),
    "a system text is asked for": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system text') }}{% endif %}" + CHATML,
        "<|im_end|>", [SYSTEM, user()], "See", [100, 7, NL, 12, SP, 13, 101, NL, *ASKED], [10, 101], {101}),
    "{% generation %}": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "</s>", [user()], "See", [103, 8, 105, 104], [10, 105], {105, 2}),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_ids(case):
    template, eos, prompt, answer, prompt_ids, answer_ids, stops = GOLDEN[case]
    tok = tokenizer(template, eos)
    chat = ChatFormat(tok)
    assert chat.encode(prompt, answer) == (prompt_ids, answer_ids), (tok.decode(chat.encode(prompt, answer)[0]), tok.decode(chat.encode(prompt, answer)[1]))
    assert chat.stop_ids == stops and chat.end_id == answer_ids[-1]
    assert prove_tokens(chat, [(prompt, answer, None)]).rows == 1


def test_t4_a_thought_that_the_template_drops_refuses_the_row():
    chat = ChatFormat(tokenizer(R1))
    with pytest.raises(ValueError, match=r"drops a part of the answer: of '<think>\\npear\\n</think>\\n\\nSee' it makes '\\n\\nSee'"):
        chat.encode([user()], "<think>\npear\n</think>\n\nSee")


@pytest.mark.parametrize("template, eos", [(R1, "</s>"), (QWEN3, "<|im_end|>")])
def test_a_thought_dropped_from_an_earlier_turn_is_counted(template, eos):
    notes = Counter()
    ChatFormat(tokenizer(template, eos)).encode([user(), assistant("<think>\npear\n</think>\n\nSee"), user()], "Bye", notes=notes)
    assert notes == {"message rendered in another form": 1}


def test_t4_on_the_rows_that_showed_it():
    rows = [json.loads(line)["messages"] for line in ("""
{"messages": [{"role": "user", "content": "Count the fruits: pear, dog 0?"}, {"role": "assistant", "content": "<think>\\npear is a fruit, dog 0 is none.\\n</think>\\n\\nThere are one."}]}
{"messages": [{"role": "user", "content": "Count the fruits: pear, dog 1?"}, {"role": "assistant", "content": "<think>\\npear is a fruit, dog 1 is none.\\n</think>\\n\\nThere are one."}]}
""").strip().splitlines()]
    special = ("<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>")
    for template, kept in ((R1, False), (QWEN3, True)):
        tok = made("byte level", template, special=special, eos="<|im_end|>")
        for row in rows:
            [got] = ChatFormat(tok).encode_many([(row[:-1], row[-1]["content"], None)])
            assert (tok.decode(got[1]) == row[-1]["content"] + "<|im_end|>") if kept else isinstance(got, ValueError)


def test_t5_an_answer_with_an_end_token_in_it_is_still_refused():
    for inside in ("<|endoftext|>", "<|end|>"):
        with pytest.raises(ValueError, match="contains the end-of-turn token"):
            ChatFormat(tokenizer(PHI3, "<|endoftext|>")).encode([user()], f"See{inside}you")


def test_t6_is_counted_and_only_where_it_happens():
    notes = Counter()
    chat = ChatFormat(tokenizer(MISTRAL3))
    chat.encode_many([([SYSTEM, user()], "See", None), ([user()], "See", None)], notes)
    assert notes == {"prompt rendered otherwise once answered": 1}
    assert prove_tokens(chat, [([SYSTEM, user()], "See", None), ([user()], "See", None)]).otherwise == 1


TRAILING_SPACE = (
    "{% for m in messages %}{{ '### ' + ('Response' if m.role == 'assistant' else 'Instruction') + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response: ' }}{% endif %}"
)


@pytest.mark.parametrize("make", ["metaspace first", "metaspace always", "metaspace never", "legacy Llama"])
def test_t7_one_space_between_prompt_and_answer(make):
    tok, notes = made(make, TRAILING_SPACE), Counter()
    prompt_ids, answer_ids = ChatFormat(tok).encode([user()], "See you", notes=notes)
    assert tok.convert_ids_to_tokens(prompt_ids)[-1] == "▁"
    assert tok.convert_ids_to_tokens(answer_ids) == ["See", "▁you", "</s>"]
    assert tok.decode(prompt_ids + answer_ids) == "### Instruction: Hi\n### Response: See you</s>"
    assert notes == {"answer begins on a fresh token": 1}


def test_the_next_turns_header_ends_an_answer_only_where_the_model_stops_there():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    assert ChatFormat(tokenizer(template, "<|endoftext|>"), eos_ids=[102, 103]).encode([user()], "See") == ([103, 8, 104], [10, 103])
    assert ChatFormat(tokenizer(template, "<|endoftext|>")).encode([user()], "See") == ([103, 8, 104], [10, 102])


def test_a_template_of_thoughts_refuses_the_rows_that_have_none():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ '<think>\n' + m.reasoning_content + '\n</think>' if m.reasoning_content else '<think></think>' }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    with_thought, without = ChatFormat(tokenizer(template)).encode_many([([user()], assistant("See", reasoning_content="pear"), None), ([user()], "See", None)])
    assert with_thought == ([103, 8, 2, 104, 14, NL], [16, NL, 15, 10, 2])
    assert "generation prompt is not how it begins an assistant turn" in str(without)


def test_a_bos_that_the_tokenizer_adds_too_stands_once():
    tok = tokenizer(MISTRAL3)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    assert tok("Hi")["input_ids"] == [1, 8]
    assert ChatFormat(tok).encode([user()], "See") == ([1, 17, SP, 8, 18], [SP, 10, 2])


def test_an_unknown_token_that_is_the_eos_too_is_no_unknown_word():
    tok, notes = made("byte level", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"), Counter()
    tok.unk_token = "</s>"
    chat = ChatFormat(tok)
    chat.encode([user()], "See you", notes=notes)
    assert not [name for name in notes if "know" in name] and prove_tokens(chat, [([user()], "See you", None)]).unknown == 0


def test_t8_a_template_can_be_given():
    with pytest.raises(BadInput, match=r"my: the tokenizer has no chat template; model\.chat_template takes one"):
        ChatFormat(tokenizer(None), name="my")
    chat = ChatFormat(tokenizer(read_template("chatml"), "<|im_end|>"))
    assert chat.encode([user()], "See you") == (ASKED, [10, SP, 11, 101])


@pytest.mark.parametrize("template, said", [
    (R1.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>\n' }}"), r"generation prompt is not how it begins an assistant turn.*<think>.*model\.chat_template"),
    (CHATML.replace("<|im_end|>", "<eot>"), "closes an answer with '<eot>.*no token of the tokenizer"),
    ("{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}", "writes the assistant's text not at all"),
    ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "more than once"),
    ("{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content + eos_token }}{% endif %}{% endfor %}", "drops the user's text"),
])
def test_templates_that_are_refused_at_the_start(template, said):
    with pytest.raises(BadInput, match=said) as caught:
        ChatFormat(tokenizer(template), name="my")
    assert "\n" not in str(caught.value)


# No part of a row vanishes.

TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "w", "arguments": {"c": "Oslo"}}}
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>' + call.function.name + ' ' + ARGS }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("prompt, answer, tools, said", [
    ([user()], assistant("See", reasoning_content="pear"), None, "does not use reasoning_content"),
    ([user(), assistant(reasoning_content="pear"), user()], "See", None, "does not use reasoning_content"),
    ([user(), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "12 C"}], "See", None, "does not use tool_calls"),
    ([{**user(), "name": "Bob"}], "See", None, "does not use name"),
    ([user()], assistant("See", tool_calls=[CALL]), None, "does not use tool_calls"),
    ([user()], "See", TOOLS, "does not use tools"),
    ([user(), {"content": "See"}], "See", None, "every message needs a role that is text, found None"),
    ([user(), {"role": "user", "content": ["x"]}], "See", None, "content of the user's message must be text, found list"),
])
def test_what_the_template_does_not_use_is_refused_by_name(prompt, answer, tools, said):
    with pytest.raises(ValueError, match=said):
        ChatFormat(tokenizer(CHATML, "<|im_end|>")).encode(prompt, answer, tools=tools)


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_keys_that_say_nothing_are_none(nothing):
    chat = ChatFormat(tokenizer(CHATML, "<|im_end|>"))
    assert chat.encode([{**user(), "name": nothing}], assistant("See", tool_calls=nothing), tools=nothing or None) == chat.encode([user()], "See")


def test_a_system_text_that_the_template_drops_is_refused():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(ValueError, match=r"drops the system's text \(message 1\)"):
        ChatFormat(tokenizer(template, "<|im_end|>")).encode([SYSTEM, user()], "See")


def test_a_text_that_the_template_drops_for_what_it_says_is_refused():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if 'pear' not in m.content %}")
    kept, dropped = ChatFormat(tokenizer(template, "<|im_end|>")).encode_many([([user()], "See", None), ([user("pear"), user()], "See", None)])
    assert kept == (ASKED, [10, 101]) and "drops the user's text (message 1)" in str(dropped)


def test_a_dropped_text_is_seen_though_its_letters_stand_elsewhere():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(ValueError, match=r"drops the system's text"):
        ChatFormat(tokenizer(template, "<|im_end|>")).encode([{"role": "system", "content": "user"}, user()], "See")


@pytest.mark.parametrize("arguments", ["call.function.arguments | tojson", "call.function.arguments", "('' ~ call.function.arguments)"])
@pytest.mark.parametrize("given", [{"c": "Oslo"}, '{"c": "Oslo"}'])
def test_tools_and_their_calls_reach_the_template_as_json(arguments, given):
    tok, notes = made("byte level", WITH_TOOLS.replace("ARGS", arguments), special=("<|im_start|>", "<|im_end|>"), plain=("<tool_call>",), eos="<|im_end|>"), Counter()
    call = {"type": "function", "id": "1", "function": {"name": "w", "arguments": given}}
    prompt = [user(), assistant(None, tool_calls=[call]), {"role": "tool", "name": "w", "tool_call_id": "1", "content": "12 C"}]
    prompt_ids, answer_ids = ChatFormat(tok).encode(prompt, "See", tools=TOOLS, notes=notes)
    assert '<|im_start|>assistant\n\n<tool_call>w {"c": "Oslo"}<|im_end|>\n' in tok.decode(prompt_ids) and json.dumps(TOOLS) in tok.decode(prompt_ids)
    assert tok.decode(answer_ids) == "See<|im_end|>"
    assert notes == {"name not used by the template": 1, "tool_call_id not used by the template": 1}


def test_an_answer_that_also_calls_a_tool_ends_after_the_call():
    tok = made("byte level", WITH_TOOLS.replace("ARGS", "call.function.arguments | tojson"), special=("<|im_start|>", "<|im_end|>"), plain=("<tool_call>",), eos="<|im_end|>")
    answer = assistant("See", tool_calls=[CALL])
    assert tok.decode(ChatFormat(tok).encode([user()], answer)[1]) == 'See\n<tool_call>w {"c": "Oslo"}<|im_end|>'


def test_a_template_that_prints_a_call_only_without_content_gets_none():
    template = CHATML.replace("+ m['content'] +", "+ (m.content if m.content is not none else m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson)) +")
    tok = made("byte level", template, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    prompt_ids, _ = ChatFormat(tok).encode([user(), assistant("", tool_calls=[CALL]), user("12")], "See")
    assert "<|im_start|>assistant\nw{\"c\": \"Oslo\"}<|im_end|>" in tok.decode(prompt_ids)


def test_a_failure_on_one_row_is_no_verdict_on_others():
    template = CHATML.replace("{% for", "{% if messages[0].content == 'pear' %}{{ raise_exception('no pears') }}{% endif %}{% for")
    refused, fine = ChatFormat(tokenizer(template, "<|im_end|>")).encode_many([([user("pear"), user()], "See", None), ([user("Bye"), user()], "See", None)])
    assert "no pears" in str(refused) and fine == ([100, 5, NL, 19, 101, NL, *ASKED], [10, 101])


def test_a_row_that_is_no_unicode_is_refused_and_others_are_not():
    good, bad = ChatFormat(tokenizer(CHATML, "<|im_end|>")).encode_many([([user()], "See", None), ([user("\ud800")], "See", None)])
    assert good == (ASKED, [10, 101]) and isinstance(bad, ValueError)


def test_unknown_words_are_counted():
    notes = Counter()
    ChatFormat(tokenizer(CHATML, "<|im_end|>")).encode_many([([user()], "See plum", None), ([user()], "See <unk>", None), ([user()], "See", None)], notes)
    assert notes == {"with words that the tokenizer does not know": 1}


# Tokens that the model has no rows for (M12), and reading back.

def test_m12_tokens_past_the_model_are_refused_only_where_they_are_used():
    tok = tokenizer(PHI3.replace("<|end|>", "</s>").replace("eos_token", "''").replace("<|assistant|>", "assistant").replace("'<|' + m.role + '|>\n'", "m.role + '\n'"), "</s>")
    chat = ChatFormat(tok, eos_ids=[102], vocab_size=100)
    assert chat.stop_ids == {2}
    assert chat.encode([user()], "See") == ([5, NL, 8, 2, NL, 6, NL], [10, 2])
    with pytest.raises(ValueError, match=r"token '<\|user\|>' has id 103, and the model has 100 rows for tokens"):
        chat.encode([user("<|user|>")], "See")


def test_m12_an_end_token_past_the_model_is_refused_at_the_start():
    with pytest.raises(BadInput, match=r"token '<\|im_end\|>' has id 101, and the model has 100 rows"):
        ChatFormat(tokenizer(CHATML, "<|im_end|>"), vocab_size=100)


def test_an_end_token_that_is_not_special_is_no_text():
    assert ChatFormat(tokenizer(TURN_END, "<|endoftext|>")).decode([10, SP, 11, 106]) == "See you"


# The proof.

@pytest.mark.parametrize("break_it, said", [
    (lambda prompt, answer: (prompt, answer[:-1]), "must have the end token once"),
    (lambda prompt, answer: (prompt, [*answer, answer[-1]]), "must have the end token once"),
    (lambda prompt, answer: (prompt, [10, *answer[-1:]]), "reads"),
    (lambda prompt, answer: (prompt[:-4], answer), "reads"),
    (lambda prompt, answer: ([i for i in prompt if i != NL], [i for i in answer if i != SP]), "lost blanks"),
])
def test_the_proof_sees_ids_that_are_wrong(break_it, said):
    class Broken(ChatFormat):
        def encode_many(self, rows, notes=None):
            return [break_it(*ids) for ids in super().encode_many(rows, notes)] if hasattr(self, "ready") else super().encode_many(rows, notes)

    chat = Broken(tokenizer(CHATML, "<|im_end|>"))
    chat.ready = True
    with pytest.raises(BadInput, match=f"my.jsonl: row 1 of the 1 looked at does not survive its tokens: .*{said}"):
        prove_tokens(chat, [([user()], "See you", None)], "my.jsonl")


def test_the_proof_says_what_it_saw_in_one_line():
    facts = prove_tokens(ChatFormat(tokenizer(CHATML, "<|im_end|>")), [([user()], "See you", None), ([user()], "See plum", None)])
    assert facts.line == "tokens: 1 of 2 rows are the rendered dialogue id by id, 1 have words that the tokenizer does not know; answers end with <|im_end|>"


@pytest.mark.parametrize("name", [file.stem for file in sorted((Path(__file__).parents[2] / "spin_ray" / "templates").glob("*.jinja"))])
@pytest.mark.parametrize("make", ["byte level", "metaspace first", "legacy Llama"])
def test_every_shipped_template_works_where_its_tokens_are_known(name, make):
    special = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>")
    tok = made(make, read_template(name), special=special)
    dialogue = [user(), assistant(), user("Bye")]
    rows = [(dialogue, "See you", None), *([] if name == "gemma" else [([SYSTEM, *dialogue], "See you", None)])]
    facts = prove_tokens(ChatFormat(tok), rows)
    assert facts.rows == len(rows) and facts.otherwise == facts.unknown == facts.spacing == 0


# Templates as models ship them: TRL has copies.

SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "diffusion_gemma": "<turn|>", "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>", "glm4moe": "</s>", "gptoss": "<|return|>", "idefics3": "<end_of_utterance>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>", "llava_next": "</s>", "phi3": "<|end|>", "phi3_5": "<|end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>", "qwen3_5_nothink": "<|im_end|>", "qwen3_instruct_2507": "<|im_end|>", "nemotron_3_nano": "<|im_end|>", "smolvlm": "<end_of_utterance>",
}
REFUSED = ("deepseek_r1_distill", "deepseekv3")
"""Their generation prompt ends with <think>, and they drop every thought."""
THOUGHTS_ONLY = ("nemotron_3_nano",)
EOS = ("<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<|endoftext|>", "</s>")


def as_shipped(name: str):
    template = next(file for file in SHIPPED if file.stem == name).read_text()
    tokens = re.findall(r"<\|?[A-Za-z_/｜▁][^<>\s'\"{}]*>|\[/?[A-Z_]+\]", template)
    special = tuple(token for token in dict.fromkeys(tokens) if token not in ("<s>", "</s>", "<think>", "</think>"))
    return made("byte level", template, special=special, plain=("<think>", "</think>"), eos=next(token for token in EOS if token in [*special, "</s>"]))


@pytest.mark.parametrize("name", ENDS)
def test_templates_as_models_ship_them(name):
    chat = ChatFormat(as_shipped(name))
    thought = {"reasoning_content": "two and two"} if name in THOUGHTS_ONLY else {}
    rows = [(prompt, assistant("See you", **thought), None) for prompt in ([user()], [user("  Hi "), assistant(), user("Bye")])]
    facts = prove_tokens(chat, rows)
    assert (facts.end, facts.rows, facts.same_ids + facts.fresh) == (ENDS[name], 2, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_shipped_templates_that_cannot_be_trained_with(name):
    with pytest.raises(BadInput, match="generation prompt is not how it begins an assistant turn"):
        ChatFormat(as_shipped(name))
