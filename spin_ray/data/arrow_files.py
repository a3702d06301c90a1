"""Parquet and Arrow files, a thousand rows at a time: neither a whole table in memory nor a copy in a cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from spin_ray.errors import BadInput

Rows = Iterator[tuple[str, dict[str, Any]]]
BATCH_ROWS = 1000


def parquet(path: Path) -> Rows:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from _arrow_rows(file.iter_batches(BATCH_ROWS, use_threads=False), file.schema_arrow, path)


def arrow(path: Path) -> Rows:
    with pa.memory_map(str(path)) as file:
        of_file = file.read(6) == b"ARROW1"  # else it is a stream, as `datasets` writes it
        file.seek(0)
        reader = pa.ipc.open_file(file) if of_file else pa.ipc.open_stream(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if of_file else iter(reader)
        yield from _arrow_rows(batches, reader.schema, path)


def _arrow_rows(batches: Iterator[pa.RecordBatch], schema: pa.Schema, path: Path) -> Rows:
    if len(set(schema.names)) < len(schema.names):
        raise BadInput(f"{path}: two columns have the same name; there are {', '.join(schema.names)}")
    decode, number = _decoder(schema), itertools.count()
    for batch in batches:
        for start in range(0, len(batch), BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist(maps_as_pydicts="strict"):
                yield f"{path} row {next(number)}", decode(without_none(row))


def _decoder(schema: pa.Schema) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns a row's values back into what `datasets` was given: it writes values of mixed types as JSON text."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return lambda row: row
    import datasets

    return datasets.Features.from_arrow_schema(schema).decode_example


def without_none(value: Any) -> Any:
    """A value of Arrow's without the keys that it has filled with None because other rows have them."""
    if isinstance(value, dict):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
