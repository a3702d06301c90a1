"""Golden tests of messages -> token ids over five families of chat templates, and of what must be refused."""

from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spin_ray.chat import ChatFormat
from spin_ray.errors import BadInput


@dataclass(frozen=True)
class Family:
    template: str
    specials: tuple[str, ...]
    eos: str
    """The tokenizer's EOS, which is not always what ends a turn."""
    prompt: str
    """Golden text of the prompt of DIALOGUE."""
    answer: str
    """Golden text of its answer, end token included."""


DIALOGUE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
FAMILIES = {
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("</s>",), "</s>",
        "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\n", "See you</s>",
    ),
    "llama3": Family(
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "See you<|eot_id|>",
    ),
    "qwen": Family(
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", "See you<|im_end|>",
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"), "</s>",
        "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]", " See you</s>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<s>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>",
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        "See you<end_of_turn>",
    ),
}


def tokenizer(template: str | None, specials: tuple[str, ...], eos: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, so that tokens do span characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["Hello there, see you, bye. user assistant system model", "I said: See you again. Hi Bye"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token="<s>" if "<s>" in specials else None)
    made.chat_template = template
    return made


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[Family, PreTrainedTokenizerFast]:
    chosen = FAMILIES[request.param]
    return chosen, tokenizer(chosen.template, chosen.specials, chosen.eos)


def test_golden_ids(family):
    golden, tok = family
    prompt_ids, answer_ids = ChatFormat(tok).encode(DIALOGUE, "See you")
    assert tok.decode(prompt_ids) == golden.prompt
    assert tok.decode(answer_ids) == golden.answer


def test_sampled_prompt_is_a_prefix_of_what_is_trained_on(family):
    _, tok = family
    prompt_ids, answer_ids = ChatFormat(tok).encode(DIALOGUE, "See you")
    whole = tok(tok.apply_chat_template([*DIALOGUE, {"role": "assistant", "content": "See you"}], tokenize=False), add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt_ids)] == prompt_ids
    assert whole[: len(prompt_ids) + len(answer_ids)] == prompt_ids + answer_ids


def test_end_token_once_and_last(family):
    golden, tok = family
    chat = ChatFormat(tok)
    _, answer_ids = chat.encode(DIALOGUE, "See you")
    assert [i for i in answer_ids if i in chat.stop_ids] == [answer_ids[-1]] == [chat.end_id]
    assert tok.convert_tokens_to_ids(golden.eos) in chat.stop_ids


def test_end_token_text_inside_an_answer_is_refused(family):
    _, tok = family
    chat = ChatFormat(tok)
    end = tok.convert_ids_to_tokens(chat.end_id)
    with pytest.raises(ValueError, match="end-of-turn token"):
        chat.encode(DIALOGUE, f"See{end} you")


def test_eos_is_added_once_where_the_template_has_none():
    tok = tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
                    ("</s>",), "</s>")
    prompt_ids, answer_ids = ChatFormat(tok).encode(DIALOGUE[:1], "See you")
    assert tok.decode(prompt_ids) == "user: Hi\nassistant: "
    assert answer_ids.count(tok.eos_token_id) == 1 and answer_ids[-1] == tok.eos_token_id


def test_end_token_text_is_refused_too_where_the_template_does_not_close():
    tok = tokenizer("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}", ("</s>",), "</s>")
    with pytest.raises(ValueError, match="end-of-turn token"):
        ChatFormat(tok).encode(DIALOGUE[:1], "See</s> you")


def test_token_across_the_border_keeps_the_sampled_prompt():
    tok = tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}", ("</s>",), "</s>")
    prompt = [{"role": "user", "content": "I said: He"}]
    prompt_ids, answer_ids = ChatFormat(tok).encode(prompt, "llo")
    whole = tok("I said: Hello", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt_ids)] != prompt_ids  # "Hello" is one token: the case this test is about
    assert tok.decode(prompt_ids) == "I said: He" and tok.decode(answer_ids) == "llo</s>"


def test_generation_eos_ids_also_stop():
    golden = FAMILIES["qwen"]
    tok = tokenizer(golden.template, golden.specials, golden.eos)
    other = tok.convert_tokens_to_ids("<|endoftext|>")
    assert other in ChatFormat(tok, eos_ids=[other]).stop_ids and other not in ChatFormat(tok).stop_ids


def test_no_template_is_refused():
    with pytest.raises(BadInput, match="my-model: the tokenizer has no chat template"):
        ChatFormat(tokenizer(None, ("</s>",), "</s>"), name="my-model")


@pytest.mark.parametrize("name, dialogue", [
    ("gemma", [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]),
    ("mistral", [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}]),
])
def test_rejected_roles_are_named(name, dialogue):
    golden = FAMILIES[name]
    chat = ChatFormat(tokenizer(golden.template, golden.specials, golden.eos))
    with pytest.raises(ValueError, match=f"rejects the roles {dialogue[0]['role']}, user, assistant"):
        chat.encode(dialogue, "Hello")


def test_template_that_cannot_be_continued_is_refused():
    template = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    with pytest.raises(BadInput, match="generation prompt is not how it begins"):
        ChatFormat(tokenizer(template, ("</s>",), "</s>"))


@pytest.mark.parametrize("expression", [
    "messages.__class__.__mro__[-1].__subclasses__()", "''.__class__.__base__", "messages.append(1)", "range(10**9) | list", "1 / 0",
    "cycler.__init__.__globals__.os.system('true')",
])
def test_a_template_that_breaks_out_of_the_sandbox_or_fails_is_refused_in_one_line(expression):
    with pytest.raises(BadInput, match="my-model: the chat template cannot be used: ") as caught:
        ChatFormat(tokenizer("{{ " + expression + " }}", ("</s>",), "</s>"), name="my-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{{ 7*7 }}", "{% for m in messages %}x{% endfor %}", "../../etc/passwd", "demo:train", "${oc.env:HOME}", "%(x)s {x}"])
def test_what_a_row_says_is_never_evaluated(family, text):
    _, tok = family
    chat = ChatFormat(tok)
    prompt_ids, answer_ids = chat.encode([{"role": "user", "content": text}], text)
    assert text in chat.decode(prompt_ids) and text in chat.decode(answer_ids)
