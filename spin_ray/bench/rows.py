"""`bench rows`: what reading, tokenising and writing a million short rows takes in the driver: memory and time.

The rows are written into a scratch folder, as JSON lines, Parquet and CSV. Each file is then prepared as a run prepares it, with the
demo's model and in a process of its own; its peak memory is that process's, with all that the driver imports.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spin_ray.bench.common import print_result


def main(argv: Sequence[str]) -> int:
    """Prepare every file in a fresh process; the last line is one JSON object with seconds and GiB per format."""
    parser = argparse.ArgumentParser(prog="spin-ray bench rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", default="jsonl,parquet", help=f"of {', '.join(WRITERS)}")
    parser.add_argument("--prepare", nargs=2, metavar=("FILE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.prepare:
        return _prepare(*map(Path, options.prepare))
    result: dict[str, Any] = {"rows": options.rows}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.formats.split(","):
            path = Path(scratch, f"rows.{name}")
            WRITERS[name](path, options.rows)
            command = [sys.executable, "-m", "spin_ray", "bench", "rows", "--prepare", str(path), f"{scratch}/{name}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result[name] = {"file_gib": path.stat().st_size / 2**30, **json.loads(done.stdout.splitlines()[-1])}
    print_result(result)
    return 0


def _prepare(path: Path, folder: Path) -> int:
    """What the driver of a run does before it starts anything: the peak is read before this process ends."""
    from spin_ray.config import load_config
    from spin_ray.learner.meters import peak_resident_gib
    from spin_ray.manifest import RunDir
    from spin_ray.model import inspect_model
    from spin_ray.preflight import Proof
    from spin_ray.prepared import prepare
    from spin_ray.terminal import Terminal

    config, _ = load_config("conf/demo.yaml", [f"data.train={path}", "data.eval=", "data.max_prompts=0", f"run.dir={folder}"])
    facts, before = inspect_model(config), peak_resident_gib()
    begun = time.monotonic()
    prepared = prepare(config, RunDir.open(config), facts, Proof(), Terminal(sys.stderr))
    print(json.dumps({
        "seconds": time.monotonic() - begun, "peak_gib": peak_resident_gib(), "imports_gib": before,
        "prompts": prepared.lengths.num_prompts, "blocks": len(prepared.block_sizes), "real_tokens": prepared.lengths.real_tokens,
    }))
    return 0


def _rows(number: int) -> Iterator[dict[str, str]]:
    for k in range(number):
        question = f"Name the first and the last word of this list: pear, dog {k}, knife?"
        yield {"prompt": question, "response": f"pear and knife, with dog {k} between."}


def _write_jsonl(path: Path, number: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"messages": [
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]},
        ]}) + "\n" for row in _rows(number))


def _write_parquet(path: Path, number: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"messages": [
        {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]},
    ]} for row in _rows(number)])
    pq.write_table(table, path)


def _write_csv(path: Path, number: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(_rows(number))


WRITERS: dict[str, Callable[[Path, int], None]] = {"jsonl": _write_jsonl, "parquet": _write_parquet, "csv": _write_csv}
