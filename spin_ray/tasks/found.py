"""Which tasks `eval.tasks` names: tasks and groups of the harness, YAML files, folders of them.

The harness' own 10,000 files are only read where a name is not found in what the user names. Paths of data files in a user's YAML file are
relative to the file's folder, or to the working directory.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from spin_ray.config import EvalConfig
from spin_ray.errors import BadInput, in_one_line

Built = Task | Group


def find_tasks(config: EvalConfig) -> list[tuple[list[Built], int | None]]:
    """For each entry of `eval.tasks` its tasks and groups, their data sets loaded, and the number of examples that stands behind it.

    Raises BadInput for a name that is none, a file that cannot be read, data that cannot be had.
    """
    here = {name: _files(name) for name, _ in config.wanted}
    named = {name: _index(files) for name, files in here.items() if files}
    own = _index(_included(config.include_path))
    known = {**own, **{name: entry for index in named.values() for name, entry in index.items()}}
    missing = [name for name in here if name not in named and name not in own]
    manager = TaskManager(include_defaults=bool(missing))
    manager.task_index.update(known)
    for name in missing:
        _refuse_unknown(name, manager)
    return [(_built(manager, name, _tops(named[name]) if name in named else [name]), shots) for name, shots in config.wanted]


def _files(name: str) -> list[Path]:
    """YAML files that a name stands for; none if it is not one of a file or a folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (files := sorted(path.rglob("*.yaml"))):
            raise BadInput(f"eval.tasks={name}: no *.yaml files in this folder")
        return files
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if not path.is_file():
            raise BadInput(f"eval.tasks={name}: no such file or folder (working directory: {Path.cwd()})")
        return [path]
    return []


def _included(folder: str) -> list[Path]:
    if folder and not Path(folder).expanduser().is_dir():
        raise BadInput(f"eval.include_path={folder}: no such folder (working directory: {Path.cwd()})")
    return sorted(Path(folder).expanduser().rglob("*.yaml")) if folder else []


def _index(files: Iterable[Path]) -> dict[str, Entry]:
    """The tasks, groups and tags of a user's files. Files that only others include have none."""
    index: dict[str, Entry] = {}
    for file in files:
        try:
            config = load_yaml(file, resolve_func=False)
            if config.keys() & {"task", "group", "class"}:
                TaskIndex.process_cfg(config, file.resolve(), index)
        except Exception as error:  # the YAML reader's errors have no common base
            raise BadInput(f"{file}: not a task of lm-evaluation-harness: {in_one_line(error)}") from error
    return {name: _with_found_files(entry) for name, entry in index.items()}


def _with_found_files(entry: Entry) -> Entry:
    """A task whose data files are absolute paths. Raises BadInput for one that is not there."""
    if entry.kind is not Kind.TASK or not ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files"):
        return entry
    config = load_yaml(entry.yaml_path)  # with its functions
    found = _absolute(config["dataset_kwargs"]["data_files"], entry.yaml_path)
    return replace(entry, yaml_path=None, cfg={**config, "dataset_kwargs": {**config["dataset_kwargs"], "data_files": found}})


def _absolute(files: Any, yaml_path: Path) -> Any:
    """The same, a name, a list or a mapping of them, with every path that is relative made absolute."""
    if isinstance(files, dict):
        return {split: _absolute(each, yaml_path) for split, each in files.items()}
    if isinstance(files, list):
        return [_absolute(each, yaml_path) for each in files]
    if "://" in files or any(sign in files for sign in "*?["):
        return files
    tried = [yaml_path.parent / files, Path.cwd() / files]
    for path in tried:
        if path.is_file():
            return str(path)
    raise BadInput(f"{yaml_path}: data file {files} is neither in the file's folder nor in the working directory {tried[1].parent}")


def _tops(index: dict[str, Entry]) -> list[str]:
    """Of a file or a folder the groups, and the tasks that are in none of them."""
    groups = [name for name, entry in index.items() if entry.kind is Kind.GROUP]
    members = {member for name in groups for member in _members(index[name].cfg["task"])}
    return [name for name, entry in index.items() if entry.kind is not Kind.TAG and name not in members]


def _members(listed: Any) -> set[str]:
    each = listed if isinstance(listed, list) else [listed]
    return {member if isinstance(member, str) else str(member.get("task") or member.get("group")) for member in each}


def _refuse_unknown(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)
        raise BadInput(
            f"eval.tasks={name}: lm-evaluation-harness has no such task, and there is no such file; the nearest name is {near[0]}"
        )


def _built(manager: TaskManager, wanted: str, names: Iterable[str]) -> list[Built]:
    """Load tasks, and with them their data sets."""
    try:
        return [each for name in names for each in _each(manager._load_spec(name))]
    except BadInput:
        raise
    except Exception as error:  # a data set's own code, the hub's client and Jinja have no common base
        raise BadInput(f"eval.tasks={wanted}: cannot be loaded: {type(error).__name__}: {in_one_line(error)}{_about_hub(error)}") from error


def _about_hub(error: Exception) -> str:
    """A word on the network, if it is an error of what fetches data sets."""
    fetched = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "huggingface_hub", "datasets")
    return "; a data set of the hub needs the network once, then it is read from the hub's cache on this machine" if fetched else ""


def _each(found: Built | list[Task]) -> list[Built]:
    return found if isinstance(found, list) else [found]


def leaves(built: Built) -> list[Task]:
    """The tasks themselves."""
    return built.get_all_tasks() if isinstance(built, Group) else [built]
