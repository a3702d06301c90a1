"""Real tokenizers of every common make, small enough to train in a moment: what people's models come with."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = ["Hello there, see you, bye. user assistant system model", "I said: See you again. Hi Bye ### Response: ### Instruction: [INST]", "See you 123"] * 9


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def spm_decoder(strip: bool) -> decoders.Sequence:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if strip else [])])


def trained_spm(scheme: str) -> Tokenizer:
    """A sentencepiece-like BPE: ▁ for a space, bytes for what is not in the vocabulary."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIALS + BYTES, show_progress=False))
    made = Tokenizer(models.BPE(vocab=trained.get_vocab(), merges=merges(trained), byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.add_special_tokens(SPECIALS)
    return made


def metaspace(scheme: str, split: bool = False) -> Tokenizer:
    made = trained_spm(scheme)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split), spm_decoder(scheme != "never")
    return made


def legacy() -> Tokenizer:
    """Llama 2's tokenizer.json: a normalizer puts ▁ before every piece of text, so behind added tokens too."""
    made = trained_spm("always")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = spm_decoder(True)
    return made


def unigram() -> Tokenizer:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    trained.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False))
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    made = Tokenizer(models.Unigram([*pieces[:3], *((byte, -20.0) for byte in BYTES), *pieces[3:]], unk_id=0, byte_fallback=True))
    made.add_special_tokens(SPECIALS)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace("▁", prepend_scheme="first"), spm_decoder(True)
    return made


def byte_level(prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
    return made


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False))
    return made


MAKES = {
    "byte level": byte_level, "byte level, prefix space": lambda: byte_level(True), "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"), "metaspace always": lambda: metaspace("always"),
    "metaspace always, split": lambda: metaspace("always", True), "legacy Llama": legacy, "unigram": unigram, "word level": word_level,
}
KEEPS_SPACES = ["byte level", "metaspace first", "metaspace never", "unigram"]
ADDS_PREFIX_SPACES = ["byte level, prefix space", "metaspace always", "metaspace always, split", "legacy Llama"]
"""These put a space behind added tokens where the text has none."""


@cache
def _json(make: str) -> str:
    return MAKES[make]().to_str()


def made(make: str, template: str | None = None, *, special: tuple[str, ...] = (), plain: tuple[str, ...] = (), eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer of this make with added tokens, special ones and others."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_json(make)), eos_token=eos, bos_token="<s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.chat_template = template
    return tokenizer
