"""`bench plan`: the memory that `spin-ray plan` predicts for the learner beside what a step takes, over settings that change it.

Every case is a config of its own and a process of its own on the CPU, which takes two optimizer steps on pairs of equal lengths. What a
process takes without a model is measured first, with a model of 30,000 weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_ray.bench.common import print_result
from spin_ray.errors import BadInput, RunStopped

STEPS = 2


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    settings: tuple[str, ...] = ()
    """key=value."""
    model: str = "mid"
    """A shape of workload.py."""
    changes: tuple[tuple[str, Any], ...] = ()
    """To the shape."""
    prompt: int = 64
    answer: int = 64


BARE = Case("without a model", ("learner.batch_pairs=2",), model="tiny")
HALF = ("model.dtype=bfloat16", "learner.batch_pairs=4", "learner.pack_tokens=512")
"""Few tokens: a CPU without matrix instructions for bfloat16 takes minutes for more."""
CASES = (
    Case("AdamW"),
    Case("RMSprop", ("learner.optimizer=rmsprop",)),
    Case("AdamW in 8 bits", ("learner.optimizer=adamw_8bit",)),
    Case("activations computed again", ("learner.activation_checkpointing=true",)),
    Case("rows of 256 tokens", ("learner.pack_tokens=256",)),
    Case("rows of 3,040 tokens, one a step", ("learner.pack_tokens=4096",)),
    Case("prompts and answers of 256", ("learner.batch_pairs=8",), prompt=256, answer=256),
    Case("a pair longer than a row", ("learner.batch_pairs=8", "learner.pack_tokens=512"), prompt=256, answer=256),
    Case("not tied", changes=(("tie_word_embeddings", False),)),
    Case("frozen scorer", ("reference.scorer=frozen",)),
    Case("ZeRO-1", ("learner.zero_stage=1",)),
    Case("ZeRO-2", ("learner.zero_stage=2",)),
    Case("ZeRO-2, RMSprop", ("learner.zero_stage=2", "learner.optimizer=rmsprop")),
    Case("ZeRO-3", ("learner.zero_stage=3",)),
    Case("ZeRO-1, bfloat16", ("learner.zero_stage=1", *HALF)),
    Case("ZeRO-2, bfloat16", ("learner.zero_stage=2", *HALF)),
    Case("ZeRO-3, bfloat16", ("learner.zero_stage=3", *HALF)),
    Case("adapter", ("lora.rank=16",)),
    Case("adapter, rows of 3,040 tokens", ("lora.rank=16", "learner.pack_tokens=4096")),
    Case("adapter, ZeRO-2", ("lora.rank=16", "learner.zero_stage=2")),
    Case("adapter, base in 4 bits", ("lora.rank=16", "model.quantization=nf4")),
    Case("12.7M weights", ("learner.pack_tokens=448",), model="small"),
    Case("SmolLM2-135M's shape, ZeRO-2, RMSprop", (
        "learner.zero_stage=2", "learner.optimizer=rmsprop", "learner.pack_tokens=2048"), model="smollm2", prompt=77, answer=32),
    Case("264M weights", ("learner.optimizer=rmsprop", "learner.batch_pairs=8"), model="0.3b"),
)
COMMON = (
    "learner.zero_stage=0", "learner.optimizer=adamw", "learner.batch_pairs=16", "learner.pack_tokens=1024", "data.train=none",
    "spin.num_iterations=1",
)


def main(argv: Sequence[str]) -> int:
    """Prints a Markdown table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(prog="spin-ray bench plan", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="parts of the names of cases, with commas between: only those")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return _child(Path(options.child))
    chosen = [case for case in CASES if not options.cases or any(part in case.name for part in options.cases.split(","))]
    if not chosen:
        raise BadInput(f"--cases {options.cases}: no such case; they are {', '.join(case.name for case in CASES)}")
    base, results = measured(BARE), []
    print(f"without a model {base:.2f} GiB\n\n| case | predicted GiB | measured GiB | off by |\n|---|---|---|---|")
    for case in chosen:
        results.append(one := {"case": case.name, "predicted_gib": predicted(case, base), "measured_gib": measured(case)})
        off = one["predicted_gib"] / one["measured_gib"] - 1
        print(f"| {case.name} | {one['predicted_gib']:.2f} | {one['measured_gib']:.2f} | {off:+.0%} |", flush=True)
    print_result({"base_gib": base, "cases": results})
    return 0


def predicted(case: Case, base_gib: float) -> float:
    """GiB, by the plan."""
    from spin_ray.look.plan.inputs import Asked
    from spin_ray.look.plan.plan import make_plan

    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as name:
        config = _written(case, Path(name), weights=False)
        asked = Asked(prompt_tokens=case.prompt, answer_tokens=case.answer, num_prompts=STEPS * config.learner.batch_pairs)
        return make_plan(config, asked, base=base_gib * 2**30).learner.peak / 2**30


def measured(case: Case) -> float:
    """GiB: the peak of a process that takes the steps. Raises RunStopped with its last words where it fails."""
    with tempfile.TemporaryDirectory(prefix="spin-ray-bench-") as name:
        folder = Path(name)
        _written(case, folder, weights=True)
        env = {
            **os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": "0", "LOCAL_RANK": "0",
            "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        }
        words = [sys.executable, "-m", "spin_ray", "bench", "plan", "--child", str(folder)]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RunStopped(f"{case.name}: {(done.stderr or done.stdout)[-2000:]}")
        return float((folder / "peak").read_text())


def _written(case: Case, folder: Path, *, weights: bool) -> Any:
    """The case's config, and in the folder what the process reads."""
    from spin_ray.bench import workload
    from spin_ray.config import load_config

    (folder / "case.yaml").write_text(json.dumps({"model": {"path": str(folder / "model")}}))
    words = [*COMMON, *case.settings]
    (folder / "words.json").write_text(json.dumps([*words, case.prompt, case.answer]))
    workload.save_model(folder / "model", case.model, weights=weights, **dict(case.changes))
    return load_config(folder / "case.yaml", words)[0]


def _child(folder: Path) -> int:
    import numpy as np
    import torch.distributed as dist

    from spin_ray.bench import workload
    from spin_ray.config import load_config
    from spin_ray.learner.engine import MainPlayer
    from spin_ray.learner.meters import peak_resident_gib
    from spin_ray.losses import PairObjective
    from spin_ray.nodes import Node
    from spin_ray.placement import choose_hardware
    from spin_ray.records import Saved, opponent_reference

    *words, prompt, answer = json.loads((folder / "words.json").read_text())
    config, _ = load_config(folder / "case.yaml", words)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    if config.lora.rank:
        workload.save_adapter(folder, rank=config.lora.rank)
    saved = Saved(str(folder / "model"), str(folder / workload.ADAPTER) if config.lora.rank else None)
    hardware = choose_hardware(config, [Node("here", {"CPU": 8})])
    player = MainPlayer(saved, config.learner, hardware, quantized=bool(config.model.quantization))
    player.begin_iteration()
    vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    lengths, each = workload.Lengths(prompt, answer, 0.0), config.learner.batch_pairs
    pairs = workload.random_pairs(STEPS * each, vocab_size=vocabulary, lengths=lengths)
    references = np.array([[opponent_reference(pair)] for pair in pairs])
    if config.scorer == "frozen":
        player.keep_copy("opponent")
        player.score(pairs[:each], copy="opponent")
    for start in range(0, len(pairs), each):
        batch = slice(start, start + each)
        player.step(pairs[batch], references[batch], objective=PairObjective(0.1), lr=1e-5)
    (folder / "peak").write_text(str(peak_resident_gib()))
    dist.destroy_process_group()
    return 0
