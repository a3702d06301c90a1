"""Which model `spin-ray chat` talks to: a version of a run, wherever its parts lie, or any model's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin_ray.config import Config, ModelConfig
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.look.state import version_named
from spin_ray.look.stored import Stored, open_stored
from spin_ray.records import Saved
from spin_ray.storage import DISK, Disk
from spin_ray.theta import Thetas


@dataclass(frozen=True)
class Chosen:
    """A model to talk to."""

    name: str
    """theta_2, or its folder."""
    where: str
    """For the user."""
    saved: Saved
    model: ModelConfig
    """dtype, chat template and whether the folder's code may run."""
    storage: Disk = DISK

    def config(self, saved: Saved) -> Config:
        """As `inspect_model` takes it; `saved`: where its parts lie on this machine."""
        return replace(Config(), model=replace(self.model, path=saved.model, adapter=saved.adapter or "", quantization=""))


def choose(where: str, *, iteration: int | None, compare: bool) -> list[Chosen]:
    """One version, or with `compare` theta_0 and it. Raises BadInput for what is not there."""
    if not _is_run(where):
        if compare or iteration is not None:
            raise BadInput(f"{where}: a model alone has no iterations; --iteration and --compare want a run's folder, such as runs/demo")
        return [_model(where)]
    stored = open_stored(where)
    newest = len(stored.marks("iteration"))
    best = stored.read("best").decode(errors="replace").strip()
    version = iteration if iteration is not None else version_named(best) if best else newest
    if not 0 <= version <= newest:
        raise BadInput(f"{stored}: there is no theta_{version}; it has theta_0 to theta_{newest}" if newest else
                       f"{stored}: there is no theta_{version}: no iteration is finished, so there is theta_0 alone")
    numbers = [0, version] if compare and version else [version]
    if compare and not version:
        raise BadInput(f"{stored}: theta_0 is what would be compared with itself; name another one with --iteration (1 to {newest})"
                       if newest else f"{stored}: no iteration is finished, so there is nothing to compare theta_0 with")
    return [_version(stored, number) for number in numbers]


def _is_run(where: str) -> bool:
    """Whether something there is to be read as a run: what is not a model's folder, or a name that is none on a disk."""
    if "://" in where:
        return True
    folder = Path(where).expanduser()
    if not folder.is_dir():
        return False
    config = folder / "config.json"
    return "run" in _json(config) if config.exists() else not (folder / "adapter_config.json").exists()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path}: damaged ({error})") from error
    return found if isinstance(found, dict) else {}


def _model(where: str) -> Chosen:
    path = resolve(where)
    if not (Path(path) / "adapter_config.json").exists() or (Path(path) / "config.json").exists():
        return Chosen(where, path, Saved(path), ModelConfig(path=path))
    base = str(_json(Path(path) / "adapter_config.json").get("base_model_name_or_path") or "")
    if not base:
        raise BadInput(f"{where}: an adapter that does not name its base")
    return Chosen(where, path, Saved(resolve(base), path), ModelConfig(path=base))


def _version(stored: Stored, version: int) -> Chosen:
    config, run = stored.config, stored.run
    if not stored.saved_config:
        raise BadInput(f"{stored}: no run's folder: there is no config.json in it")
    model = config.model
    base = str(run.quantized_base()) if model.quantization else resolve(model.path)
    given = str(Path(model.adapter).expanduser().absolute()) if model.adapter else str(run.first_adapter()) if config.lora.rank else None
    thetas = Thetas(run, config.lora, Saved(base, given))
    saved = thetas.saved(version)
    for part in (saved.model, saved.adapter):
        _refuse_gone(stored, version, part)
    is_export = version > 0 and not saved.adapter
    return Chosen(f"theta_{version}", thetas.name(version), saved, replace(model, chat_template="") if is_export else model, run.storage)


def _refuse_gone(stored: Stored, version: int, part: str | None) -> None:
    """A part that the run itself has written must still be there; what it only started from is looked up when it is loaded."""
    if part and Path(part).is_relative_to(stored.run.path) and not stored.has(Path(part)):
        raise BadInput(f"{stored.run.storage.name(Path(part))}: the folder of theta_{version} is gone; put it back, or name another one "
                       "with --iteration")
