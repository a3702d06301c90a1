"""The study's own data, drawn by the generator of the embedded data: prompts for searching rates, and extra preference pairs.

Their instructions differ from the embedded rows' and from each other's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from spin_ray.demo import resolve
from spin_ray.demo.tasks import Task, careless_answer, draw_task

NUM_SEARCH, NUM_PREFERENCES = 500, 6_400


def make_data(folder: Path) -> dict[str, Path]:
    """Write what is not there yet; returns name -> file: search, preferences (careful against careless), chosen (the careful ones)."""
    files = {name: folder / f"{name}.jsonl" for name in ("search", "preferences", "chosen")}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        rng = Random(7)
        tasks = _new_tasks(rng)
        rows = {"search": [_row(next(tasks)) for _ in range(NUM_SEARCH)], "preferences": [], "chosen": []}
        for _ in range(NUM_PREFERENCES):
            task = next(tasks)
            rows["preferences"].append({"prompt": task.instruction, "chosen": task.careful, "rejected": careless_answer(task, rng)})
            rows["chosen"].append(_row(task))
        for name, file in files.items():
            temporary = file.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
            temporary.replace(file)
    return files


def _new_tasks(rng: Random) -> Iterator[Task]:
    seen = {
        json.loads(line)["messages"][0]["content"] for name in ("demo:train", "demo:heldout")
        for line in Path(resolve(name)).read_text().splitlines()
    }
    while True:
        task = draw_task(rng)
        if task.instruction not in seen:
            seen.add(task.instruction)
            yield task


def _row(task: Task) -> dict[str, object]:
    turns = [{"role": "user", "content": task.instruction}, {"role": "assistant", "content": task.careful}]
    return {"messages": turns, "answer": task.careful}
