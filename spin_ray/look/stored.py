"""A run as it lies on a disk or an object store, for those who only look: nothing is locked, nothing in it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spin_ray.config import Config, RunConfig
from spin_ray.errors import BadInput
from spin_ray.manifest import RunDir
from spin_ray.storage import DISK, ObjectStore, open_storage

SCRATCH = "~/.cache/spin_ray/look"
"""Of an object store's files those that must lie on a disk; apart from run.scratch, where a run on this machine may be at work."""


@dataclass(frozen=True)
class Stored:
    """What was in a run's files when they were first asked for."""

    run: RunDir

    def __str__(self) -> str:
        return str(self.run)

    @property
    def on_disk(self) -> bool:
        return self.run.storage is DISK

    @cached_property
    def saved_config(self) -> dict[str, Any] | None:
        """None where there is no config.json yet. Raises BadInput for one that is no JSON."""
        text = self.read("config.json")
        try:
            found = json.loads(text) if text else None
        except ValueError as error:
            raise BadInput(f"{self.named('config.json')}: damaged ({error}); is this the folder of a run?") from error
        return found if isinstance(found, dict | None) else {}

    @cached_property
    def config(self) -> Config:
        """The run's; keys that another version of this program wrote are passed over, those that it lacked have their defaults."""
        return _filled(Config(), self.saved_config or {})

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """Of the manifest."""
        return list(whole_lines(self.read("manifest.jsonl")))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return list(whole_lines(self.read("metrics.jsonl")))

    def marks(self, *stages: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry.get("stage") in stages]

    def read(self, name: str) -> bytes:
        return self.run.storage.read(self.run.path / name)

    def has(self, path: Path) -> bool:
        return self.run.storage.exists(path)

    def named(self, name: str) -> str:
        return self.run.storage.name(self.run.path / name)

    def lines(self, path: Path) -> list[str]:
        """Of a text file; none where it is not there."""
        return self.run.storage.read(path).decode(errors="backslashreplace").splitlines()


def open_stored(where: str) -> Stored:
    """A run by its folder or its URL (s3://bucket/runs/demo). Raises BadInput for what cannot be read."""
    if "://" not in where:
        path = Path(where).expanduser().absolute()
        if not path.is_dir():
            raise BadInput(f"{where}: no such folder; give a run's, such as runs/demo, or its URL")
        return Stored(RunDir(path))
    url, _, query = where.partition("?")
    parent, _, name = url.rstrip("/").rpartition("/")
    if not (name and urlsplit(parent).netloc):
        raise BadInput(f"{where}: give the URL of a run, such as s3://bucket/runs/demo")
    config = replace(Config(), run=RunConfig(name=name, dir=f"{parent}{'?' if query else ''}{query}", scratch=SCRATCH))
    config.run.check()
    return Stored(RunDir(config.run_path, open_storage(config)))


def file_names(stored: Stored, folder: Path) -> list[str]:
    """Files of a run's folder, without what is half-written."""
    storage = stored.run.storage
    names = storage.file_names(folder) if isinstance(storage, ObjectStore) or folder.is_dir() else []
    return [name for name in names if not name.startswith(".")]


def whole_lines(text: bytes) -> Iterator[dict[str, Any]]:
    """Lines of JSON; one that is being written, or that a crash cut short, is passed over."""
    for line in text.splitlines(keepends=True):
        if line.endswith(b"\n"):
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry


def _filled(section: Any, saved: dict[str, Any]) -> Any:
    """A dataclass of the config with what is saved in place of its defaults."""
    values = {}
    for entry in fields(section):
        if entry.name in saved:
            own = getattr(section, entry.name)
            values[entry.name] = _filled(own, saved[entry.name]) if is_dataclass(own) else saved[entry.name]
    return replace(section, **values)
