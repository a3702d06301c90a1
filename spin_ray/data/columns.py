"""Which columns of a row, and keys of a message, say nothing about what is trained on.

Every name ends in one of four ways: used by a format, harmless (this file), named in data.ignore_columns, or refused. A name is
harmless only if no value of it could change which text is the prompt and which is the answer. Scores and ranks are harmless too: which
rows are good enough is for their owner to choose, before; a label, which may turn an answer's meaning round, is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

HARMLESS = frozenset("""
id ids idx index uuid guid hash key row row_number line_number __index_level_0__
source sources source_dataset dataset dataset_name data_source origin subset split url urls link license licence author
category categories domain topic topics subject tag tags keywords task_name task_type task_category difficulty
lang language languages locale country state
score scores rating quality upvotes likes rank reward toxic toxicity redacted openai_moderation detoxify_moderation moderation
model models model_name generator annotator worker user_name username avatarUrl hashed_ip header
date time timestamp timestamps created created_at create_time updated updated_at update_time
length tokens token_count tokens_count word_count char_count turn turn_identifier
parallel_tool_calls finish_reason usage metadata meta version
""".split())
ENDINGS = ("_id", "_ids", "_uuid", "_hash", "_score", "_scores", "_rating", "_url", "_timestamp", "_tokens", "_token_count")
BEGINNINGS = ("num_", "score_", "rating_")
NOT_HARMLESS = frozenset("tool_call_id input_ids token_ids prompt_ids label_ids".split())
_MEDIA = ("image", "img", "picture", "pic", "photo", "figure", "audio", "video", "speech", "sound", "media")
"""Names that only look like those above, and how the names of what a text model cannot see begin."""
INDEX_COLUMNS = ("", "Unnamed: 0")
"""What pandas calls a table's row numbers in a CSV file."""
REASONS = {
    "label": "says whether an answer is good or bad; keep the rows with good answers",
    "labels": "may be the ids that are trained on, or say whether an answer is good or bad",
    "rejected": "is the worse of two answers, and there is no chosen one",
    "generated": "is an opponent's answer, and there is no real one",
    "images": "holds pictures, which text models cannot see",
    "image": "holds a picture, which text models cannot see",
}
REMEDY = "name it in data.ignore_columns if the dialogue is whole without it"


class Sieve:
    """What becomes of the names of one row that no format uses; `ignored` collects those that were passed over."""

    def __init__(self, ignore: Iterable[str] = ()) -> None:
        self._ignore = frozenset(ignore)
        self.ignored: list[str] = []

    def shown(self, fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """The fields that the user did not name in data.ignore_columns."""
        self.ignored += [prefix + name for name, value in fields.items() if name in self._ignore and not is_absent(value)]
        return {name: value for name, value in fields.items() if name not in self._ignore}

    def passes(self, name: str, prefix: str = "") -> bool:
        """Whether a name is harmless; it is noted then."""
        if not is_harmless(name):
            return False
        self.ignored.append(prefix + (name or "(no name)"))
        return True

    def refuse(self, name: str) -> None:
        """Raise ValueError for a column that is neither used nor harmless."""
        reason = REASONS.get(name, "is neither a known part of a dialogue nor known to be harmless")
        raise ValueError(f"column {name if name.isprintable() else ascii(name)} {reason}; {REMEDY}")


def is_absent(value: Any) -> bool:
    """None and what is empty: Arrow fills what other rows have with None, CSV with no text."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that hold something."""
    return {name: value for name, value in fields.items() if not is_absent(value)}


def is_harmless(name: str) -> bool:
    if name in NOT_HARMLESS or name.lower().startswith(_MEDIA):
        return False
    return name in HARMLESS or name in INDEX_COLUMNS or name.endswith(ENDINGS) or name.startswith(BEGINNINGS)


def count_ignored(counts: Counter[str], names: Iterable[str]) -> None:
    """Note names under "ignored NAME", once for each row that has them."""
    counts.update(f"ignored {name}" for name in dict.fromkeys(names))
