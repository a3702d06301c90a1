"""`bench gpu`: every path that only a GPU takes, on whatever this machine has installed; `make gpu-check`.

Each check is a process of its own, so that its memory is its own and one that dies is a line of the table. torch, transformers, pyarrow
and omegaconf are enough for the first half; a check that wants a package which is not there says which. `--device cpu` tries the checks
themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

TIMEOUT_S = 1800.0
OK, FAILED, LACKS = "ok", "failed", "lacks"


@dataclass(frozen=True)
class Check:
    """A path, tried: raises what goes wrong, returns figures."""

    run: Callable[[str, Path], dict[str, Any]]
    """(device, scratch folder) -> figures."""
    needs: tuple[str, ...] = ()
    """Packages beside those that all want."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spin-ray bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", default=list(CHECKS), help=f"default all: {', '.join(CHECKS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        options.one.write_text(json.dumps(_try(options.checks[0], options.device)))
        return 0
    results = {}
    for name in options.checks:
        results[name] = _in_own_process(name, options.device)
        print(f"{name:<14} {results[name]['state']:<7} {_in_words(results[name])}", flush=True)
    print(json.dumps({"device": _device_name(options.device), "checks": results}))
    return int(any(result["state"] == FAILED for result in results.values()))


def _in_words(result: dict[str, Any]) -> str:
    return result.get("why") or "  ".join(f"{key} {value}" for key, value in result.items() if key != "state")


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" and torch.cuda.is_available() else device


def _in_own_process(name: str, device: str) -> dict[str, Any]:
    if lacks := [package for package in ("pyarrow", "omegaconf", *CHECKS[name].needs) if find_spec(package) is None]:
        return {"state": LACKS, "why": ", ".join(lacks)}
    from spin_ray.bench.common import told_by_process  # wants pyarrow

    told = told_by_process("gpu", name, "--device", device, timeout_s=TIMEOUT_S)
    return {"state": FAILED, "why": told} if isinstance(told, str) else told


def _try(name: str, device: str) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            figures = CHECKS[name].run(device, Path(scratch))
    except Exception as error:  # whatever it says is the result
        traceback.print_exc()
        return {"state": FAILED, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"state": OK, **figures, "seconds": round(time.perf_counter() - begun, 1)}


def attention(device: str, _: Path) -> dict[str, Any]:
    """Torch's variable-length kernel in bfloat16, in one call and in two, with windows, against float32: values and gradients."""
    import torch
    from torch import nn

    from spin_ray.bench.random_models import PAIRS
    from spin_ray.learner.attention import CurrentRow, packed_attention
    from spin_ray.learner.packing import pack

    def attended(tensors: list[torch.Tensor], share_prompt: bool, window: int | None) -> list[torch.Tensor]:
        layer, leaves = nn.Module(), [tensor.detach().requires_grad_() for tensor in tensors]
        CurrentRow(layer).begin(pack(PAIRS, share_prompt=share_prompt).to(tensors[0].device))
        out, _ = packed_attention(layer, *leaves, None, sliding_window=window)
        out.float().sin().sum().backward()
        return [out.float(), *(leaf.grad.float() for leaf in leaves)]

    worst = 0.0
    for share_prompt in (False, True):
        length = len(pack(PAIRS, share_prompt=share_prompt).input_ids)
        tensors = [torch.randn(1, heads, length, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2)]
        for window in (None, 4, 1000):
            half, full = (attended([t.to(dtype) for t in tensors], share_prompt, window) for dtype in (torch.bfloat16, torch.float32))
            worst = max(worst, *(float((ours - exact).abs().max()) for ours, exact in zip(half, full, strict=True)))
    _require(worst < 0.1, f"apart by {worst:.3g}")
    return {"largest_difference": round(worst, 4)}


def packed(device: str, _: Path) -> dict[str, Any]:
    """A packed row through the learner's forward and backward pass in bfloat16 against plain transformers: `proof.compare`."""
    import torch

    from spin_ray.bench.random_models import PAIRS
    from spin_ray.learner.proof import TOLERANCES, compare

    policy, facts = _policy("qwen3-0.6b" if device == "cuda" else "small", device), {}
    for share_prompt in (True, False):
        found = compare(policy, PAIRS, share_prompt=share_prompt)
        found.check(TOLERANCES[torch.bfloat16], "bfloat16")
        facts |= {f"mean_nats_{'shared' if share_prompt else 'alone'}": round(found.mean_nats, 5)}
    return facts


def sharing(device: str, _: Path) -> dict[str, Any]:
    """What it gains to compute a pair's prompt once: forward and backward pass, and the bound 2 (P + A) / (P + 2 A)."""
    from spin_ray.bench.workload import Lengths, random_pairs
    from spin_ray.learner.packing import pack

    shape, count = ("qwen3-0.6b", 16) if device == "cuda" else ("small", 4)
    policy = _policy(shape, device)
    pairs = random_pairs(count, vocab_size=500, lengths=Lengths(300.0, 100.0, 0.0))
    took = {}
    for share_prompt in (True, False, True, False):
        row = pack(pairs, share_prompt=share_prompt).to(policy.head.weight.device)
        for _ in range(3):
            with _timed(device) as seconds:
                policy(row).sum().backward()
            policy.zero_grad(set_to_none=True)
        took[share_prompt] = seconds[0]
    return {"ratio": round(took[False] / took[True], 3), "bound": round(2 * 400 / 500, 3)}


def logits(device: str, _: Path) -> dict[str, Any]:
    """Peak memory of the chunked log-probs against logits of the whole row, for a large vocabulary."""
    import torch

    from spin_ray.bench.workload import Lengths, random_pairs
    from spin_ray.learner.packing import pack

    _require(device == "cuda", "only a GPU tells its peak memory")
    policy = _policy("qwen3-0.6b", device)
    row = pack(random_pairs(16, vocab_size=500, lengths=Lengths(100.0, 300.0, 0.0)), share_prompt=True).to(policy.head.weight.device)
    peaks = {}
    ways = {"chunked": lambda: policy(row), "whole": lambda: policy.lm(row.input_ids[None]).logits.float().log_softmax(-1)}
    for name, run in ways.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run().sum().backward()
        policy.zero_grad(set_to_none=True)
        peaks[name] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    return {f"{name}_gib": value for name, value in peaks.items()}


def resting(device: str, _: Path) -> dict[str, Any]:
    """A model with its optimizer gives the device back and takes it again."""
    import torch

    from spin_ray.learner.resting import Resting

    policy = _policy("qwen3-0.6b" if device == "cuda" else "small", device)
    optimizer = torch.optim.AdamW(policy.parameters())
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    before = [parameter.detach().to("cpu", copy=True) for parameter in policy.parameters()]
    held = torch.cuda.memory_reserved() if device == "cuda" else 0
    if device != "cuda":
        before = [torch.from_numpy(tensor.float().numpy().copy()) for tensor in before]  # memory that is not torch's own to give back
    with _timed(device) as rest_s:
        rested = Resting(torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    left, size = (torch.cuda.memory_reserved() if device == "cuda" else 0), rested.num_bytes
    with _timed(device) as wake_s:
        rested.end()
    after = [parameter.detach().cpu() for parameter in policy.parameters()]
    same = [torch.equal(ours.to(theirs.dtype), theirs) for ours, theirs in zip(after, before, strict=True)]
    _require(all(same), "the weights came back otherwise")
    gib = {name: round(value / 2**30, 3) for name, value in (("gib", size), ("held_gib", held), ("left_gib", left))}
    return {**gib, "rest_s": round(rest_s[0], 2), "wake_s": round(wake_s[0], 2)}


def learner(device: str, scratch: Path) -> dict[str, Any]:
    """The main player under every ZeRO stage, offloaded, checkpointed, at rest and back: the same losses."""
    return _main_players(device, scratch, {
        **{f"zero_{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)}, "offloaded": {"zero_stage": 2, "offload_optimizer": True},
        "checkpointed": {"zero_stage": 1, "activation_checkpointing": True},
    })


def lora(device: str, scratch: Path) -> dict[str, Any]:
    """The same with an adapter."""
    return _main_players(device, scratch, {f"zero_{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)}, rank=16)


def qlora(device: str, scratch: Path) -> dict[str, Any]:
    """The same with an adapter over 4 bits."""
    return _main_players(device, scratch, {f"zero_{stage}": {"zero_stage": stage} for stage in (0, 1, 2)}, rank=16, quantized=True)


def steps(device: str, _: Path) -> dict[str, Any]:
    """`bench learner`, with the contestants that are installed."""
    contestants = "ours,naive" + (",trl,trl_best" if find_spec("trl") else "")
    models = ["--model", "qwen3-0.6b"] if device == "cuda" else ["--model", "tiny", "--steps", "1"]
    words = [sys.executable, "-m", "spin_ray", "bench", "learner", "--device", device, "--contestants", contestants, *models]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    _require(not done.returncode, (done.stderr.strip().splitlines() or ["died"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def sampler(device: str, scratch: Path) -> dict[str, Any]:
    """vLLM with a tiny model's weights and with new ones, against transformers: `bench samplers`. It sleeps and wakes in `run`."""
    from spin_ray.bench.samplers import in_own_process

    found = in_own_process("llama")
    _require(all(result == "exact" or result.startswith("wrong: 0.0") for result in found.values()), str(found))
    return found


def run(device: str, scratch: Path) -> dict[str, Any]:
    """A whole run whose players take turns."""
    from spin_ray.bench.common import last_evaluation, run_spin

    begun = time.perf_counter()
    run_spin("conf/demo.yaml", scratch / "run", ["spin.num_iterations=2", "data.max_prompts=640", "placement.mode=shared"])
    return {"run_s": round(time.perf_counter() - begun, 1), "exact_match": last_evaluation(scratch / "run").get("exact_match_t1_share")}


DEEPSPEED = ("deepspeed", "ray")
CHECKS = {
    "attention": Check(attention), "packed": Check(packed), "sharing": Check(sharing), "logits": Check(logits), "resting": Check(resting),
    "learner": Check(learner, DEEPSPEED), "lora": Check(lora, (*DEEPSPEED, "peft")),
    "qlora": Check(qlora, (*DEEPSPEED, "peft", "bitsandbytes")), "steps": Check(steps, DEEPSPEED),
    "sampler": Check(sampler, ("vllm", "ray")), "run": Check(run, ("vllm", *DEEPSPEED)),
}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _policy(shape: str, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from spin_ray.bench.workload import SHAPES
    from spin_ray.learner import attention as packed_attention
    from spin_ray.learner.logps import PolicyLogps

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=packed_attention.NAME)
    return PolicyLogps(lm.to(device), chunk_elements=256 * 2**20 if device == "cuda" else None)


@contextmanager
def _timed(device: str) -> Iterator[list[float]]:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    seconds, begun = [], time.perf_counter()
    yield seconds
    if device == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begun)


def _main_players(
    device: str, scratch: Path, setups: dict[str, dict[str, Any]], *, rank: int = 0, quantized: bool = False
) -> dict[str, Any]:
    """Losses of three steps on the same batch under each setup, with a rest between the second and the third."""
    import os

    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    import torch.distributed as dist

    from spin_ray.bench.workload import ADAPTER, SHAPES, random_pairs, save_adapter, save_model, with_references
    from spin_ray.config import LearnerConfig
    from spin_ray.learner.engine import MainPlayer
    from spin_ray.losses import PairObjective
    from spin_ray.placement import Hardware
    from spin_ray.records import Saved, opponent_reference

    cuda = device == "cuda"
    backend, dtype = ("nccl", "bfloat16") if cuda else ("gloo", "float32")
    save_model(scratch / "model", "small")
    if rank:
        save_adapter(scratch, rank=rank)
    pairs = with_references(random_pairs(8, vocab_size=SHAPES["small"]["vocab_size"]), scratch / "model", device=device)
    references = np.array([[opponent_reference(pair)] for pair in pairs])
    dist.init_process_group(backend, init_method=f"file://{scratch}/store", rank=0, world_size=1)
    hardware, found = Hardware(device, dtype, 0, int(cuda), 1e-3, True, 1, backend), {}
    for name, settings in setups.items():
        config = LearnerConfig(optimizer="adamw", batch_pairs=8, pack_tokens=2048, **settings)
        saved = Saved(str(scratch / "model"), str(scratch / ADAPTER) if rank else None)
        player = MainPlayer(saved, config, hardware, quantized=quantized)
        player.begin_iteration()
        losses = []
        for step in range(3):
            losses.append(player.step(pairs, references, objective=PairObjective(0.1), lr=1e-4)["loss"])
            if step == 1:
                player.rest()
                player.wake()
                player.begin_iteration()
        found[name] = [round(loss, 4) for loss in losses]
        _require(losses[2] < losses[1] < losses[0], f"{name}: losses {found[name]}")
    first = next(iter(found.values()))
    worst = max(abs(a - b) for losses in found.values() for a, b in zip(losses, first, strict=True))
    _require(worst < 0.05, f"setups differ by {worst:.3g}: {found}")
    dist.destroy_process_group()
    return {"losses": first, "largest_difference": round(worst, 5)}
