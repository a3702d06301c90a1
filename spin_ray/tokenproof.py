"""The proof that the user's own rows become the tokens that their template means, done anew beside the code that makes them.

`chat.py` cuts texts and joins ids; here the ids are read back as text and compared with what transformers renders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from spin_ray.chat import ChatFormat, Ids, Row
from spin_ray.errors import BadInput
from spin_ray.rendering import Message


@dataclass(frozen=True)
class TokenFacts:
    """What the proof saw."""

    rows: int
    end: str
    """The end token as text."""
    same_ids: int
    """Rows whose prompt and answer are, id by id, the rendered dialogue up to the end token."""
    fresh: int
    """Rows whose answer begins on a fresh token where the dialogue has one across the border; they read the same."""
    otherwise: int
    """Rows whose prompt the template renders otherwise once it is answered."""
    unknown: int
    """Rows with words that the tokenizer does not know: these cannot be read back."""
    spacing: int
    """Rows whose runs of spaces or line breaks the tokenizer does not keep."""

    @property
    def line(self) -> str:
        """One line for the user."""
        rest = [
            (self.fresh, "begin the answer on a fresh token"),
            (self.otherwise, "have a prompt that is rendered otherwise once answered"),
            (self.unknown, "have words that the tokenizer does not know"),
            (self.spacing, "have line breaks or spaces that it does not keep"),
        ]
        said = "".join(f", {number} {what}" for number, what in rest if number)
        return f"tokens: {self.same_ids} of {self.rows} rows are the rendered dialogue id by id{said}; answers end with {self.end}"


def prove_tokens(chat: ChatFormat, rows: Sequence[Row], name: str = "data.train") -> TokenFacts:
    """Show on rows that tokens say what the template renders: prompt, answer, end. Rows that `encode` refuses are not looked at.

    Raises BadInput with the place of the row among these, what differs, and what to do.
    """
    seen: list[set[str]] = []
    for number, (row, ids) in enumerate(zip(rows, chat.encode_many(rows), strict=True), start=1):
        if isinstance(ids, ValueError):
            continue
        try:
            seen.append(_compare(chat, row, ids))
        except ValueError as error:
            raise BadInput(f"{name}: row {number} of the {len(rows)} looked at does not survive its tokens: {error}") from error
    same, *kinds = [sum(kind in found for found in seen) for kind in ("same", "fresh", "otherwise", "unknown", "spacing")]
    return TokenFacts(len(seen), chat.tokenizer.convert_ids_to_tokens(chat.end_id), same, *kinds)


def _compare(chat: ChatFormat, row: Row, ids: Ids) -> set[str]:
    """What is to be said of this row; ValueError if its ids do not read as what is rendered for it."""
    prompt, answer, tools = row
    message: Message = {"role": "assistant", **({"content": answer} if isinstance(answer, str) else answer)}
    given, dialogue = _rendered(chat, prompt, message, tools)
    prompt_ids, answer_ids = ids
    _end_is_once_and_last(chat, answer_ids)
    if chat.unknown_id in {*prompt_ids, *answer_ids}:
        return {"unknown"}
    both = [*prompt_ids, *(answer_ids if chat.closes else answer_ids[:-1])]  # an end that the template does not write is our own
    whole = chat.tokenizer(dialogue, add_special_tokens=False)["input_ids"]
    if whole[: len(both)] == both:
        kinds = {"same"} | _reads(chat.tokenizer, both, dialogue, "the dialogue")
    elif dialogue.startswith(given):
        kinds = {"fresh"} | _reads(chat.tokenizer, both, dialogue, "the dialogue")
    else:
        kinds = {"otherwise"} | _reads(chat.tokenizer, both, given, "the prompt")
    _answer_is_there(chat.tokenizer, ids, message, given, dialogue)
    return kinds


def _rendered(chat: ChatFormat, prompt: Sequence[Message], answer: Message, tools: list | None) -> tuple[str, str]:
    """The prompt and the answered dialogue as transformers renders them."""
    row, _ = chat.template.dialogue(prompt, answer, tools)
    return chat.template.renderer.given(row), chat.template.renderer.whole(row)


def _end_is_once_and_last(chat: ChatFormat, answer_ids: Sequence[int]) -> None:
    if [k for k, token in enumerate(answer_ids) if token in chat.stop_ids] != [len(answer_ids) - 1] or answer_ids[-1] != chat.end_id:
        tokens = chat.tokenizer.convert_ids_to_tokens(list(answer_ids)[-4:])
        raise ValueError(f"its answer ends with the tokens {tokens}, and must have the end token once, at its end")


def _reads(tokenizer: Any, ids: Sequence[int], text: str, what: str) -> set[str]:
    """Check that one of these, read as text, is how the other begins; {"spacing"} if only blanks differ, which the tokenizer changes."""
    read, text = _plain(tokenizer, _text(tokenizer, ids)), _plain(tokenizer, text)
    letters, wanted = "".join(read.split()), "".join(text.split())
    size = min(len(letters), len(wanted))
    if letters[:size] != wanted[:size]:
        place = next(k for k in range(size) if letters[k] != wanted[k])
        raise ValueError(f"{what} reads {letters[place:][:40]!r} where {wanted[place:][:40]!r} is rendered (blanks left out)")
    lost = {place for place in _breaks(tokenizer, text) - _breaks(tokenizer, read) if place < size}
    if lost:
        raise ValueError(f"{what} reads {read[:60]!r}, which has lost blanks of {text[:60]!r}; the tokenizer is not the model's")
    return set() if read.startswith(text) or text.startswith(read) else {"spacing"}


def _answer_is_there(tokenizer: Any, ids: Ids, message: Message, given: str, dialogue: str) -> None:
    """The prompt has the template's, the answer has the row's text, and is rendered as such."""
    asked, both = (_squeezed(tokenizer, _text(tokenizer, some)) for some in (ids[0], [*ids[0], *ids[1][:-1]]))
    answered = both[len(asked) :]
    if not asked.startswith(_squeezed(tokenizer, given)):
        raise ValueError(f"the prompt reads {asked[-60:]!r} at its end, the template gives {given[-60:]!r}")
    text = _squeezed(tokenizer, message.get("content") or "")
    if text and both.rfind(text) + len(text) <= len(asked):  # its begin (<think>) may be the generation prompt's
        raise ValueError(f"the answer reads {answered[:60]!r} (blanks left out), and has not all of {str(message['content'])[:60]!r}")
    if answered not in _squeezed(tokenizer, dialogue):
        raise ValueError(f"the answer reads {answered[:60]!r} (blanks left out), which is not in the rendered dialogue")


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _plain(tokenizer: Any, text: str) -> str:
    """A text as the tokenizer normalises it, without blanks at its begin and behind added tokens, where older tokenizers put some."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    text = text if normalizer is None else normalizer.normalize_str(text).replace("▁", " ")
    return re.sub(f"({_added(tokenizer)}) +", r"\1", text).lstrip(" ")


def _squeezed(tokenizer: Any, text: str) -> str:
    return "".join(_plain(tokenizer, text).split())


def _breaks(tokenizer: Any, text: str) -> set[int]:
    """After how many letters a text has blanks, but for those around added tokens: some of these swallow them (Phi-3)."""
    tight = re.sub(rf"\s*({_added(tokenizer)})\s*", r"\1", text)
    return set(accumulate(len(word) for word in tight.split()))


@lru_cache(maxsize=1)
def _added(tokenizer: Any) -> str:
    """A pattern of the added tokens, the longest first."""
    texts = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()), key=len, reverse=True)
    begins = "".join(sorted({re.escape(text[0]) for text in texts}))
    return f"(?=[{begins}])(?:{'|'.join(map(re.escape, texts))})" if texts else "(?!)"  # what is first looked at is one letter
