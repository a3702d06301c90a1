"""`bench models`: every causal-LM family of transformers, tiny and random, through the learner's way and through plain transformers.

A family that the driver would refuse is refused here by the same function. Of every other one several models (weights tied and
not, options of its own) are made in float32, with noise on all parameters and buffers, dropout on in the config, and windows
shorter than the answers, and compared (learner/proof.py) in one packed row of different pairs:
- log-probs of every answer token and the gradient of every parameter, prompts shared and not, activations kept and computed again;
- log-probs by transformers before the model is wrapped and after its export is loaded again.

A family is tried in a process of its own. With all families it writes docs/models.md; its last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spin_ray.errors import in_one_line
from spin_ray.families import reason_to_refuse

TIMEOUT_S = 120.0
SAME_NATS = 1e-5
"""Between two computations of transformers on the same weights."""
SMALLEST_SPREAD_NATS = 0.1
"""A model whose log-probs are all alike would hide what is wrong."""
DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Found:
    status: str
    """exact, refused or wrong."""
    architecture: str
    why: str = ""
    max_nats: float = 0.0
    gradient: float = 0.0
    """Largest relative difference of a parameter's gradient."""
    num_models: int = 0


def main(argv: Sequence[str]) -> int:
    """Try the families; prints a line for each and one JSON object as the last line. Exit code 1 if one is wrong."""
    parser = argparse.ArgumentParser(prog="spin-ray bench models", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; default all, and docs/models.md is written")
    parser.add_argument("--try-refused", action="store_true", help="compare those too that the driver refuses; writes nothing")
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from spin_ray.bench.random_models import families

    begun, found = time.perf_counter(), {}
    for model_type in options.families or families():
        found[model_type] = in_own_process(model_type, try_refused=options.try_refused)
        print(_line(model_type, found[model_type]), flush=True)
    if not options.families and not options.try_refused:
        (DOCS / "models.md").write_text(_document(found))
    counts = {status: sum(each.status == status for each in found.values()) for status in ("exact", "refused", "wrong")}
    print(json.dumps({"families": len(found), **counts, "seconds": round(time.perf_counter() - begun, 1)}))
    return 1 if counts["wrong"] else 0


def _line(model_type: str, found: Found) -> str:
    numbers = f"{found.max_nats:.0e} nats, gradients {found.gradient:.0e}, {found.num_models} models" if found.num_models else ""
    return f"{model_type:<26} {found.status:<8} {numbers}{found.why}"


def in_own_process(model_type: str, *, try_refused: bool = False) -> Found:
    """Whatever a family's code does, the bench goes on: a crash or a hang is "wrong", for a family that is not refused."""
    _import_what_children_need()
    context = multiprocessing.get_context("fork")  # importing torch and transformers anew takes longer than a family
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, model_type, try_refused))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(TIMEOUT_S) else Found("wrong", "", f"nothing within {TIMEOUT_S:g} s")
    except EOFError:
        return Found("wrong", "", "its process died")
    finally:
        process.kill()
        process.join()


def _import_what_children_need() -> None:
    import torch

    import spin_ray.bench.random_models
    import spin_ray.learner.export
    import spin_ray.learner.proof  # noqa: F401

    torch.set_num_threads(1)  # a forked process has none of the threads that others would wait for


def _child(pipe: Connection, model_type: str, try_refused: bool) -> None:
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    pipe.send(examine(model_type, try_refused=try_refused))


def examine(model_type: str, *, try_refused: bool = False) -> Found:
    """Compare the family's tiny models, or say why it is refused."""
    from spin_ray.bench.random_models import tiny_config, variants

    architecture = _architecture(model_type)
    try:
        configs = [tiny_config(model_type, **options) for options in variants(model_type)]
        reason = reason_to_refuse(configs[0])
    except Exception as error:  # a config that cannot be made small says nothing of the family, but its own defaults do
        configs, reason = [], _refused_by_default(model_type) or f"tiny config: {in_one_line(error)[:200]}"
        if not _refused_by_default(model_type):
            return Found("wrong", architecture, reason)
    if reason and not (try_refused and configs):
        return Found("refused", architecture, reason)
    facts = []
    for config in configs:
        try:
            facts.append(_compare(config))
        except Exception as error:
            return Found("wrong", architecture, f"{type(error).__name__}: {in_one_line(error)[:200]}")
    wrong = [why for _, _, why in facts if why]
    nats, gradient = max(fact[0] for fact in facts), max(fact[1] for fact in facts)
    return Found("wrong" if wrong else "exact", architecture, " ".join(wrong[:1]), nats, gradient, len(configs))


def _refused_by_default(model_type: str) -> str | None:
    from transformers import AutoConfig

    try:
        return reason_to_refuse(AutoConfig.for_model(model_type))
    except Exception as error:  # not even a config by default
        return f"has no default config ({in_one_line(error)[:80]})"


def _architecture(model_type: str) -> str:
    from transformers.models.auto import modeling_auto

    names = {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return names[model_type]


def _compare(config: Any) -> tuple[float, float, str]:
    """Largest difference of a log-prob, of a gradient, and what is wrong in words, empty if nothing is."""
    import torch

    from spin_ray.bench.random_models import PAIRS, tiny_model
    from spin_ray.learner import attention, proof
    from spin_ray.learner.logps import PolicyLogps
    from spin_ray.learner.modes import checkpoint_activations, quieten

    lm = tiny_model(config).eval()
    plain = _transformers(lm, PAIRS)
    lm.set_attn_implementation(attention.NAME)
    if lm.supports_gradient_checkpointing:
        lm.gradient_checkpointing_enable()
    policy = PolicyLogps(lm.train())
    quieten(policy)
    facts = []
    for share_prompt in (True, False):
        for recompute in (False, True):
            checkpoint_activations(lm, recompute)
            facts.append(proof.compare(policy, PAIRS, share_prompt=share_prompt, num_parameters=None))
    with tempfile.TemporaryDirectory() as folder:
        reloaded = _transformers(_exported(lm, Path(folder)), PAIRS)
    wrong = [str(each) for each in facts if not each.within(proof.EXACT)]
    if float((reloaded - plain).abs().max()) > SAME_NATS:
        wrong.append(f"exported and loaded again: {float((reloaded - plain).abs().max()):.1e} nats")
    if float(plain.std()) < SMALLEST_SPREAD_NATS or not torch.isfinite(plain).all():
        wrong.append(f"log-probs spread by {float(plain.std()):.1e} nats only")
    return max(each.max_nats for each in facts), max(each.gradient for each in facts), "; ".join(wrong)


def _transformers(lm: Any, pairs: Sequence[Any]) -> Any:
    import torch

    from spin_ray.learner.proof import plain_logps

    with torch.no_grad():
        return torch.cat([plain_logps(lm, pair.prompt_ids, answer) for pair in pairs for answer in (pair.real_ids, pair.generated_ids)])


def _exported(lm: Any, folder: Path) -> Any:
    """The model as an iteration's end writes it, loaded by transformers alone."""
    from spin_ray.families import auto_class
    from spin_ray.learner.export import write_model
    from spin_ray.learner.names import FolderNames

    names = FolderNames(lm)
    bucket = [entry for group in names.groups for entry in names.convert(group, [t.detach() for t in names.of(group)]).items()]
    write_model(lm, [bucket], folder, {})
    return auto_class(lm.config).from_pretrained(folder, attn_implementation="eager").eval()


# docs/models.md

_ASK_VLLM = """
import json
from vllm.model_executor.models import ModelRegistry
print(json.dumps(sorted(ModelRegistry.get_supported_archs())))
"""


def _document(found: dict[str, Found]) -> str:
    import transformers

    known, measured = _known_to_vllm(), _measured_samplers()
    exact = {name: each for name, each in found.items() if each.status == "exact"}
    rows = [_row(name, each, known, measured) for name, each in exact.items()]
    by_reason: dict[str, list[str]] = {}
    for name, each in found.items():
        if each.status != "exact":
            by_reason.setdefault(re.sub(rf"the (composite )?family {re.escape(name)}\b", r"a \1family", each.why), []).append(name)
    return "\n".join((
        "# Model families", "",
        "Made by `python -m spin_ray bench models`; do not edit. A family is the `model_type` in a model's `config.json`.", "",
        f"transformers {transformers.__version__} has {len(found)} families here. Of {len(exact)} the learner computes the log-probs and",
        "all gradients as transformers does: tiny random models, float32, several pairs in one row, exported and loaded again. The",
        "numbers are the largest difference of a token's log-prob in nats, and of a parameter's gradient, relative to it. All others",
        "are refused before anything starts. *sampler*: what `bench samplers` found on a CPU (new weights are taken up, log-probs",
        "are transformers' own), or else only whether vLLM knows the class, or would run transformers' own code for it. *run*: whether",
        "`spin-ray run` can play with it; `sft` needs no sampler.", "",
        "| family | class | learner | log-probs | gradients | sampler | run |", "|---|---|---|---|---|---|---|", *rows, "",
        "## Refused", "", "| the model ... | families |", "|---|---|",
        *(f"| {why} | {', '.join(names)} |" for why, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))), "",
        "Any other `model_type`, and models that need code of their own for log-probs, are refused with the same words.", "",
    ))


def _row(name: str, found: Found, known: set[str], measured: dict[str, dict[str, str]]) -> str:
    if name in measured:
        steps = measured[name]
        worst = next((each for each in steps.values() if each != "exact"), "exact")
        sampler = "exact" if worst == "exact" and len(steps) == 3 else worst[:120]
    else:
        sampler = "known to vLLM" if found.architecture in known else "through transformers"
    run = {"exact": "yes", "known to vLLM": "the audit decides", "through transformers": "the audit decides"}.get(sampler, "no; `sft` only")
    return f"| {name} | {found.architecture} | exact | {found.max_nats:.0e} | {found.gradient:.0e} | {sampler} | {run} |"


def _known_to_vllm() -> set[str]:
    done = subprocess.run([sys.executable, "-c", _ASK_VLLM], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def _measured_samplers() -> dict[str, dict[str, str]]:
    """Results of `bench samplers`, by family."""
    path = DOCS / "samplers.json"
    return json.loads(path.read_text()) if path.exists() else {}
