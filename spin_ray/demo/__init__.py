"""The embedded model and data, known by names: demo:base, demo:sft (models), demo:train, demo:heldout (data)."""

from pathlib import Path

HERE = Path(__file__).parent


def resolve(path: str) -> str:
    """The path behind demo:NAME; any other path as it is."""
    if not path.startswith("demo:"):
        return path
    name = path.removeprefix("demo:")
    return str(HERE / name if (HERE / name).is_dir() else HERE / f"{name}.jsonl")
