"""Text of models and of files, made safe for a terminal: it is data, and must not act."""

from __future__ import annotations

import unicodedata

_TURNS_TEXT = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They let what follows be written in another order than it is read."""


def printable(text: str) -> str:
    """The text without control characters, so without escape sequences; line ends and tabs stay."""
    return "".join(sign for sign in text if sign in "\n\t" or not (unicodedata.category(sign) in ("Cc", "Cs") or sign in _TURNS_TEXT))


def one_line(text: str) -> str:
    """The same in one line."""
    return " ".join(printable(text).split())
