"""`bench samplers`: which model families vLLM loads and reloads on this machine, with what log-probs.

Every family is a tiny random model in a process of its own: the opponent's engine scores a text, as does transformers with its own eager
attention; then weights with noise go the way of a run (bucket, `load`) into the engine, twice, and both score again.

A family's `load`, `reload` and `again` are "exact" (log-probs differ by at most 1e-3 nats), "wrong: D" (by D nats) or "refused: why".
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spin_ray.bench.common import told_by_process

TOLERANCE_NATS, TIMEOUT_S = 1e-3, 240.0
PROMPT, ANSWER = tuple(range(3, 15)), tuple(range(40, 290, 10))


def main(argv: Sequence[str]) -> int:
    """Try the families; prints a line for each and one JSON object, family -> results, as the last line."""
    from spin_ray.bench.tiny import COMPOSITE, FAMILIES

    parser = argparse.ArgumentParser(prog="spin-ray bench samplers", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=[*FAMILIES, *COMPOSITE], help="model types; default all")
    parser.add_argument("--json", type=Path, help="file to keep the results in: those of other families in it stay")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        options.one.write_text(json.dumps(_try(options.families[0])))
        return 0
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for family in options.families:
        results[family] = in_own_process(family)
        print(f"{family:<20} " + "  ".join(f"{step} {result}" for step, result in results[family].items()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    return 0


def in_own_process(family: str) -> dict[str, str]:
    """The family's results; a process that dies or hangs is a result too."""
    told = told_by_process("samplers", family, timeout_s=TIMEOUT_S)
    return {"load": f"refused: {told}"} if isinstance(told, str) else told


def _try(family: str) -> dict[str, str]:
    import torch

    from spin_ray.bench.tiny import save_tiny
    from spin_ray.config import Config
    from spin_ray.nodes import Node
    from spin_ray.placement import choose_hardware
    from spin_ray.records import Saved, Version
    from spin_ray.sampler.engine import OpponentEngine

    hardware = choose_hardware(Config(), [Node("here", {"CPU": 2, "GPU": float(torch.cuda.is_available())})], learner=False)
    os.environ.update(hardware.sampler_env)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, step = Path(scratch, "model"), "load"
        save_tiny(family, folder)
        moments = list(states(family, folder))  # before vLLM is imported: it changes classes of transformers
        try:
            engine = OpponentEngine(
                Saved(str(folder)), version=Version(0), dtype="float32", max_model_len=128, seed=0,
                settings={**hardware.engine, "skip_tokenizer_init": True, "max_num_batched_tokens": 256},
            )
            for number, (step, state) in enumerate(zip(("load", "reload", "again"), moments, strict=True)):
                if number == 1:  # as a run's sampler begins: it changes nothing
                    engine.try_reload().result(60)
                    assert compared(engine, Version(0), moments[0]) == found["load"]
                if number:
                    engine.load(Version(number), partial(published, state, engine)).result(60)
                found[step] = compared(engine, Version(number), state)
        except Exception as error:  # whatever an engine says to a model is what is asked here
            found[step] = f"refused: {_root(error)}"[:300]
            traceback.print_exc()
    return found


@dataclass
class State:
    """A model at one moment."""

    logps: np.ndarray
    """Of ANSWER after PROMPT, as transformers computes them, [num_answer_tokens], in nats."""
    bucket: Any
    tied_names: dict[str, str]


def states(family: str, folder: Path) -> Iterator[State]:
    """The model of the folder, and then twice with noise on its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from spin_ray.bench.tiny import COMPOSITE, perturb
    from spin_ray.exchange.weights import to_bucket
    from spin_ray.learner.names import FolderNames

    auto = AutoModelForImageTextToText if family in COMPOSITE else AutoModelForCausalLM
    lm = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    names = FolderNames(lm)
    for number in range(3):
        if number:
            perturb(lm, 0.05, seed=number)
        tensors = [entry for group in names.groups for entry in names.convert(group, [t.detach().clone() for t in names.of(group)]).items()]
        yield State(_logps(lm), to_bucket(tensors), names.tied())


def _logps(lm: Any) -> np.ndarray:
    import torch

    ids = torch.tensor([[*PROMPT, *ANSWER]])
    with torch.no_grad():
        logps = torch.log_softmax(lm(ids).logits[0].float(), -1)
    return logps[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None])[:, 0].numpy()


def published(state: State, engine: Any) -> Any:
    """The state's weights as a sampler gets them."""
    from spin_ray.exchange.weights import from_bucket

    return from_bucket(state.bucket, engine.second_names(state.tied_names))


def compared(engine: Any, version: Any, state: State) -> str:
    off = float(np.abs(engine.score(version, PROMPT, ANSWER).result(120) - state.logps).max())
    return "exact" if off <= TOLERANCE_NATS else f"wrong: {off:.3g}"


def _root(error: BaseException) -> str:
    """Type and first line of what began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
