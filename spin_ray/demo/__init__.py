"""The embedded model and data, known by names: demo:base, demo:sft (models), demo:train, demo:heldout (data)."""

import os
from pathlib import Path

HERE = Path(__file__).parent


def resolve(path: str) -> str:
    """The path behind demo:NAME, or behind ~; any other path, or name on a hub, as it is."""
    if not path.startswith("demo:"):
        return os.path.expanduser(path)
    name = path.removeprefix("demo:")
    return str(HERE / name if (HERE / name).is_dir() else HERE / f"{name}.jsonl")
