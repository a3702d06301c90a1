"""The embedded model and data, known by names: demo:base, demo:sft (models), demo:train, demo:heldout (data)."""

import os
from pathlib import Path

HERE = Path(__file__).parent


def resolve(path: str) -> str:
    """The path behind demo:NAME or behind ~, absolute where something lies there: workers are in folders of their own. A name on a
    hub as it is.
    """
    if not path.startswith("demo:"):
        path = os.path.expanduser(path)
        return os.path.abspath(path) if os.path.exists(path) else path
    name = path.removeprefix("demo:")
    return str(HERE / name if (HERE / name).is_dir() else HERE / f"{name}.jsonl")
