"""JSON and tables of text, row by row.

`json` reads JSON lines, one at a time: Arrow's reader (and so `datasets`) wants one type per key, fills the rest with None, and knows
no line numbers. `csv` reads tables, and every cell stays text: where a type is guessed from the cells, the answers 007, NA, 1e5 and
True become something else.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from spin_ray.data.messages import unique
from spin_ray.data.rows import KNOWN
from spin_ray.errors import BadInput

Rows = Iterator[tuple[str, dict[str, Any]]]
LONGEST_CELL = 2**30


def json_lines(lines: Iterator[bytes], path: Path) -> Rows:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _object(_parse(line, where), where)


def json_file(file: io.BufferedReader, path: Path) -> Rows:
    """One list of rows, or one row per line. Packed files cannot be read twice, hence the look ahead."""
    if not file.peek(2**12).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        yield from _list_of_rows(file.read(), path)
        return
    begin: list[bytes] = []
    while sum(map(_is_written, begin)) < 2 and (line := file.readline()):
        begin.append(line)
    first, *more = filter(_is_written, begin)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError) as error:
        whole = _parse(b"".join([*begin, file.read()]), str(path))  # if that is right, it is one object over several lines
        raise BadInput(f"{path}: {_WHAT_JSON_HOLDS}{_wrapped(whole)}") from error
    if not more and not KNOWN & row.keys():
        raise BadInput(f"{path}: {_WHAT_JSON_HOLDS}{_wrapped(row)}")
    yield from json_lines(itertools.chain(begin, file), path)


def _is_written(line: bytes) -> bool:
    return bool(line.strip())


def _wrapped(value: Any) -> str:
    lists = [str(name) for name, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    return f"; this one is an object, with a list under {' and '.join(lists)}: save that list alone" if lists else ""


_WHAT_JSON_HOLDS = "a .json data file must hold one list of rows, or one row per line"


def _list_of_rows(content: bytes, path: Path) -> Rows:
    """Row by row, so that never more than the text and one row are in memory."""
    with _valid_json(str(path)):
        text = content.decode(json.detect_encoding(content))
        place = _space(text, 0)
        if not text.startswith("[", place):
            raise BadInput(f"{path}: {_WHAT_JSON_HOLDS}{_wrapped(_DECODER.decode(text))}")
    del content
    place = _space(text, place + 1)
    for number in itertools.count():
        if number == 0 and text.startswith("]", place):
            break
        with _valid_json(str(path)):
            row, place = _DECODER.raw_decode(text, place)
        yield f"{path} row {number}", _object(row, f"{path} row {number}")
        place = _space(text, place)
        if not text.startswith(",", place):
            break
        place = _space(text, place + 1)
    with _valid_json(str(path)):
        if not text.startswith("]", place) or _space(text, place + 1) < len(text):
            raise json.JSONDecodeError("Expecting ',' between rows and ']' at the end", text, place)


_DECODER = json.JSONDecoder(object_pairs_hook=unique)


def _space(text: str, place: int) -> int:
    """The place behind white space."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _parse(text: bytes, where: str) -> Any:
    with _valid_json(where):
        return json.loads(text, object_pairs_hook=unique)


@contextmanager
def _valid_json(where: str) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error
    except json.JSONDecodeError as error:
        place = f"character {error.pos + 1}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise BadInput(f"{where}: not valid JSON: {error.msg.removesuffix(' at')} at {place}") from error
    except (ValueError, RecursionError) as error:  # a key that is there twice, a number of 5,000 digits
        raise BadInput(f"{where}: not valid JSON: {error}") from error


def not_utf8(where: str, error: UnicodeDecodeError) -> BadInput:
    return BadInput(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert it, as with iconv -t UTF-8")


def comma_separated(file: IO[bytes], path: Path) -> Rows:
    return _table(file, path, ",")


def tab_separated(file: IO[bytes], path: Path) -> Rows:
    return _table(file, path, "\t")


_SEPARATORS = {",": "commas", "\t": "tabs"}


def _table(file: IO[bytes], path: Path, delimiter: str) -> Rows:
    """Rows of text under a header; an empty cell is empty text, and nothing is taken for a number or for missing."""
    csv.field_size_limit(LONGEST_CELL)
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        records = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] = next(records, [])
        if len(set(header)) < len(header):
            raise BadInput(f"{path} line 1: two columns have the same name; the header is {', '.join(header)}")
        if len(header) == 1 and any(sign in header[0] for sign in {";", "\t", "|", ","} - {delimiter}):
            raise BadInput(f"{path} line 1: one column named {header[0]!r}; cells of such a file are separated by {_SEPARATORS[delimiter]}")
        line = records.line_num + 1
        while (cells := _next_record(records, line, path)) is not None:
            if cells and len(cells) != len(header):
                raise BadInput(f"{path} line {line}: {len(cells)} cells under {len(header)} columns ({', '.join(header)})")
            if cells:
                yield f"{path} line {line}", dict(zip(header, cells, strict=True))
            line = records.line_num + 1


def _next_record(records: Any, line: int, path: Path) -> list[str] | None:
    try:
        return next(records, None)
    except csv.Error as error:
        raise BadInput(f"{path} line {line}: {error}; a quote inside a cell in quotes must be doubled") from error
