"""Any source of data as a stream of (where, row), in the order of its files and rows.

| source | read by |
|---|---|
| .jsonl, .ndjson; .json with one list, or with one row per line | text_files.py, by `json` |
| .csv, .tsv: every cell is text, empty or not | text_files.py, by `csv` |
| any of these packed: .gz, .bz2, .xz, .zst behind the ending | the same, unpacked on the way |
| .parquet, .arrow | arrow_files.py |
| a folder of such files: train-00000-of-00002.parquet, data/test.jsonl | each as above; `datasets` says what is which split |
| a folder that `datasets` saved, with splits or without | `datasets` |
| a name on the hub | `datasets` |

Nothing is cached but what the hub sends: a file that has changed is read anew.
What cannot be read is a BadInput with the file, and the line or the row where there is one.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from spin_ray.data.arrow_files import arrow, parquet, without_none
from spin_ray.data.text_files import Rows, comma_separated, json_file, json_lines, not_utf8, tab_separated
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.hub import check_on_hub

TEXT_READERS: dict[str, Callable[[IO[bytes], Path], Rows]] = {
    ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_file, ".csv": comma_separated, ".tsv": tab_separated,
}
ARROW_READERS: dict[str, Callable[[Path], Rows]] = {".parquet": parquet, ".arrow": arrow}
ENDINGS_READ = ".jsonl, .ndjson, .json, .csv, .tsv (also with .gz, .bz2, .xz or .zst behind), .parquet, .arrow"
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json", "config.json")
BESIDE = ("README", "LICENSE", "LICENCE", "NOTICE", "CITATION", "CHANGELOG", "_SUCCESS", "_METADATA", "_COMMON_METADATA")
BESIDE_ENDINGS = (".md", ".py", ".ipynb", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".html", ".yaml", ".yml", ".lock", ".sha256", ".md5")
"""What data sets' folders hold beside the data."""
UNREADABLE = (OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError, csv.Error, pa.ArrowException)
"""ValueError and OverflowError: text that is no UTF-8, and Arrow values that Python has no type for."""


def read_rows(source: str, split: str) -> Rows:
    """Yield (where, row) of a file, a folder, a hub data set, or demo:NAME. Raises BadInput naming the place of what is unreadable."""
    path = _path(source)
    if path.is_dir():
        yield from _folder(path, split)
    elif path.exists():
        yield from read_file(path)
    elif "://" in source or any(sign in source for sign in "*?"):
        raise BadInput(f"{source}: addresses and patterns are not read; give a file, a folder of files, or a data set's name on the hub")
    elif _ending(path) or source.startswith((".", "/", "~")):
        raise BadInput(f"{source}: no such file")
    else:
        check_on_hub(source, "", kind="dataset")
        yield from _loaded(source, split, lambda datasets: datasets.load_dataset(source, split=split))


def same_rows(source: str, split: str, other: str, other_split: str) -> bool:
    """Whether two sources are the same rows: one file by whatever path, or the same split of the same data set."""
    path, other_path = _path(source), _path(other)
    if path.exists() != other_path.exists() or not (path.samefile(other_path) if path.exists() else source == other):
        return False
    has_splits = not path.is_file() and not (path / "state.json").exists()
    return split == other_split or not has_splits


def _path(source: str) -> Path:
    return Path(resolve(source)).expanduser()


def _ending(path: Path) -> str:
    """The ending that says the format, in lower case: .jsonl of X.JSONL.gz; empty if it is none that is read."""
    endings = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(endings) == 2 and endings[-1] in OPENERS and endings[0] in TEXT_READERS:
        return endings[0]
    return endings[-1] if endings and endings[-1] in TEXT_READERS | ARROW_READERS else ""


def read_file(path: Path) -> Rows:
    """The rows of one file. Raises BadInput for an ending that is not read."""
    ending = _ending(path)
    if not ending:
        raise BadInput(f"{path}: unknown kind of data file; what is read: {ENDINGS_READ}, or a folder of them, or one saved by datasets")
    with _readable(path, ending):
        if ending in ARROW_READERS:
            yield from ARROW_READERS[ending](path)
            return
        with OPENERS.get(path.suffix.lower(), _open_plain)(path) as file:
            yield from TEXT_READERS[ending](file, path)


@contextmanager
def _readable(path: Path, ending: str) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error) from error
    except UNREADABLE as error:
        kind = {".parquet": "Parquet", ".arrow": "Arrow"}.get(ending, ending)
        raise BadInput(f"{path}: not a readable {kind} file: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_zst(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 2**16)


OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


def _folder(folder: Path, split: str) -> Rows:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _loaded(str(folder), split, lambda datasets: datasets.load_from_disk(str(folder)))
        return
    for path in _files_of(folder, split):
        yield from read_file(path)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a split. Raises BadInput if there are none, or if a file of data is in no split."""
    splits = _described(folder) or _by_name(folder)
    return _split_of(splits, split, folder)


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Splits by the names of files and folders, as `datasets` finds them: train, validation, test, or all of it is train."""
    files = [path for path in _walk(folder) if not _is_no_data(path.relative_to(folder))]
    there = [path for path in files if _ending(path)]
    if not there:
        raise BadInput(f"{folder}: no data files in this folder; what is read: {ENDINGS_READ}")
    if odd := sorted(set(files).difference(there)):
        name = odd[0].relative_to(folder)
        raise BadInput(f"{folder}: {name} is no kind of data file that is read ({ENDINGS_READ}); convert it, or move it elsewhere")
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(str(folder.resolve()))
    with _loadable(str(folder)):
        found = _paths(DataFilesDict.from_patterns(get_data_patterns(base), base_path=base), folder)
    splits = {name: [path for path in paths if path in set(there)] for name, paths in found.items()}
    if forgotten := sorted(set(there).difference(*splits.values())):
        name = forgotten[0].relative_to(folder)
        raise BadInput(f"{folder}: {name} belongs to none of the splits {', '.join(splits)} by its name; rename it, or move it elsewhere")
    return {name: paths for name, paths in splits.items() if paths}


def _walk(folder: Path) -> Iterator[Path]:
    """All files of a folder, also behind links to other folders."""
    for here, _, names in os.walk(folder, followlinks=True):
        yield from (Path(here, name) for name in names)


def _is_no_data(path: Path) -> bool:
    """Whether a file is one of those that data sets' folders hold beside the data."""
    hidden = any(part.startswith(".") or part.startswith("__") for part in path.parts)
    return hidden or path.name in NO_DATA or path.name.upper().startswith(BESIDE) or path.suffix.lower() in BESIDE_ENDINGS


def _described(folder: Path) -> dict[str, list[Path]]:
    """What the README.md of a data set from the hub says of its files; empty if it says nothing."""
    readme = folder / "README.md"
    if not readme.exists() or "\nconfigs:" not in readme.read_text(errors="replace"):
        return {}
    import datasets

    with _loadable(str(folder)):
        return _paths(datasets.load_dataset_builder(str(folder.resolve())).config.data_files, folder)


def _paths(splits: Any, folder: Path) -> dict[str, list[Path]]:
    return {str(name): [folder / os.path.relpath(file, folder.resolve()) for file in files] for name, files in splits.items()}


def _loaded(source: str, split: str, load: Callable[[Any], Any]) -> Rows:
    import datasets

    with _loadable(source):
        loaded = load(datasets)
        if isinstance(loaded, datasets.DatasetDict):
            loaded = _split_of(loaded, split, source)
        for number, row in enumerate(loaded):
            yield f"{source} row {number}", without_none(row)


@contextmanager
def _loadable(source: str) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # the library raises a dozen unrelated types for "cannot be had"
        without = "; where the hub cannot be reached, give files"
        raise BadInput(f"{source}: neither a file here nor a data set that can be loaded: {_one_line(error)}{without}") from error


def _split_of(splits: Any, split: str, source: Any) -> Any:
    if split not in splits:
        raise BadInput(f"{source}: no split {split}; it has {', '.join(map(str, splits))} (data.split, data.eval_split)")
    return splits[split]
