"""Over templates made of known pieces and tokenizers of every make: what is trained on is exactly what the template renders."""

import re
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import ADDS_PREFIX_SPACES, KEEPS_SPACES, made

from spin_ray.chat import ChatFormat
from spin_ray.tokenproof import prove_tokens

SPECIAL = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|other|>")
PLAIN = ("<end_of_turn>",)
ADDED = sorted([*SPECIAL, *PLAIN, "<s>", "</s>", "<unk>"], key=len, reverse=True)


@dataclass(frozen=True)
class Pieces:
    """A template by its pieces, which are written into Jinja once and put together by hand once."""

    bos: bool
    default_system: str
    heads: tuple[str, str]
    """Before a user's (or the system's) text, and before an assistant's."""
    lead: str
    """Blanks before an assistant's text that the generation prompt has not."""
    trim: str
    user_end: str
    end: str
    after_end: str
    eos_after_dialogue: bool
    generation_prompt: bool

    @property
    def template(self) -> str:
        shaped = {"none": "m.content", "trim": "m.content | trim", "lstrip": "m.content.lstrip()"}[self.trim]
        user, assistant = self.heads
        default = f"{{% if messages[0].role != 'system' %}}{{{{ {user!r} ~ {self.default_system!r} ~ {self.user_end!r} }}}}{{% endif %}}"
        turns = (
            f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{{{{ {assistant + self.lead!r} ~ ({shaped}) ~ {self.end + self.after_end!r} }}}}"
            f"{{% else %}}{{{{ {user!r} ~ ({shaped}) ~ {self.user_end!r} }}}}{{% endif %}}{{% endfor %}}"
        )
        asks = f"{{% if add_generation_prompt %}}{{{{ {assistant!r} }}}}{{% endif %}}" if self.generation_prompt else ""
        closes = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" if self.eos_after_dialogue else ""
        return ("{{ bos_token }}" if self.bos else "") + (default if self.default_system else "") + turns + asks + closes

    def shaped(self, text: str) -> str:
        return {"none": text, "trim": text.strip(), "lstrip": text.lstrip()}[self.trim]

    def expected(self, prompt: list[dict], answer: str) -> tuple[str, str]:
        """By hand: the text that the sampler gets, and what is generated after it, end token included."""
        user, assistant = self.heads
        text = "<s>" if self.bos else ""
        if self.default_system and prompt[0]["role"] != "system":
            text += user + self.default_system + self.user_end
        for message in prompt:
            shaped = self.shaped(message["content"])
            text += assistant + self.lead + shaped + self.end + self.after_end if message["role"] == "assistant" else user + shaped + self.user_end
        begin = assistant + (self.lead if not self.generation_prompt and assistant.strip() else "")
        rest = (assistant + self.lead)[len(begin) :]
        end = self.end or self.after_end + "</s>"
        return text + begin, rest + self.shaped(answer) + end

    @property
    def end_token(self) -> str:
        return self.end or "</s>"


TEXT = st.lists(st.sampled_from(["Hello", "See", "you", " ", "  ", "\n", "\n\n", "é", "你好", "🙂", ".", ":", "Hi", "123", "'s", "\t"]), min_size=1, max_size=7).map("".join)
WORDS = TEXT.filter(lambda text: text.strip())


@st.composite
def pieces(draw) -> Pieces:
    generation = draw(st.booleans())
    heads = draw(st.sampled_from([
        ("<|user|>\n", "<|assistant|>\n"), ("<|user|>", "<|assistant|>"), ("### Instruction:\n", "### Response:\n"), ("USER: ", "ASSISTANT:"),
        ("### Instruction: ", "### Response: "), ("<|user|>user\n", "<|user|>assistant\n"), *([] if generation else [("[INST] ", "")]),
    ]))
    end = draw(st.sampled_from(["<|end|>", "<end_of_turn>", "</s>", ""]))
    return Pieces(
        bos=draw(st.booleans()), default_system=draw(st.sampled_from(["", "Be kind."])), heads=heads, lead=draw(st.sampled_from(["", " ", "\n"])),
        trim=draw(st.sampled_from(["none", "trim", "lstrip"])), user_end=draw(st.sampled_from(["\n", " [/INST]", "<|other|>"])), end=end,
        after_end=draw(st.sampled_from(["", "\n"])), eos_after_dialogue=draw(st.booleans()), generation_prompt=generation,
    )


@st.composite
def dialogues(draw) -> list[dict]:
    roles = [*(["system"] if draw(st.booleans()) else []), *["user", "assistant"] * draw(st.integers(0, 2)), "user"]
    return [{"role": role, "content": draw(WORDS)} for role in roles]


def tight(text: str) -> str:
    """Without the spaces behind added tokens and at the begin, which some tokenizers add there."""
    return re.sub(f"({'|'.join(map(re.escape, ADDED))}) +", r"\1", text).lstrip(" ")


def check(make: str, made_of: Pieces, prompt: list[dict], answer: str, same) -> None:
    tok = made(make, made_of.template, special=SPECIAL, plain=PLAIN)
    chat = ChatFormat(tok)
    prompt_ids, answer_ids = chat.encode(prompt, answer)
    wanted_prompt, wanted_answer = made_of.expected(prompt, answer)
    assert same(tok.decode(prompt_ids)) == same(wanted_prompt)
    assert same(tok.decode(prompt_ids + answer_ids)) == same(wanted_prompt + wanted_answer)
    assert tok.convert_ids_to_tokens(chat.end_id) == made_of.end_token
    assert [token in chat.stop_ids for token in answer_ids] == [False] * (len(answer_ids) - 1) + [True] and answer_ids[-1] == chat.end_id
    assert tok.eos_token_id in chat.stop_ids
    sampler = tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert wanted_prompt.startswith(sampler) and (wanted_prompt == sampler or not made_of.generation_prompt)
    assert same(chat.decode(answer_ids)).strip() == same(made_of.shaped(answer)).strip()
    assert prove_tokens(chat, [(prompt, answer, None)]).rows == 1
    assert chat.encode_many([(prompt, answer, None)] * 2) == [(prompt_ids, answer_ids)] * 2


@pytest.mark.parametrize("make", KEEPS_SPACES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(made_of=pieces(), prompt=dialogues(), answer=WORDS)
def test_what_is_trained_on_is_what_the_template_renders(make, made_of, prompt, answer):
    check(make, made_of, prompt, answer, same=str)


@pytest.mark.parametrize("make", ADDS_PREFIX_SPACES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(made_of=pieces(), prompt=dialogues(), answer=WORDS)
def test_so_it_is_but_for_the_spaces_that_a_tokenizer_adds_behind_added_tokens(make, made_of, prompt, answer):
    check(make, made_of, prompt, answer, same=tight)
