"""From a YAML file and the command line to a checked config. With the sections' MISSING, all that touches OmegaConf."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin_ray.config.schema import PRESETS, REQUIRED, Config, check
from spin_ray.config.values import flatten
from spin_ray.errors import BadInput

PRESETS_FOLDER = Path(__file__).parents[1] / "presets"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """Read a YAML file and `key=value` overrides onto the defaults.

    Returns the config and, for every dotted key, where its value came from: "default", the file, or "command line".
    Raises BadInput for an unreadable file, an unknown key (naming the nearest known one), or a value that makes no sense.
    """
    in_file = _read(path)
    given = _given(overrides)
    layers = [(str(path), in_file), ("command line", given)]
    return _merge([*_preset(layers), *layers])


def repeat_config(path: str | Path, saved: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A config that a run has saved, with overrides. `path`: where that lies, for messages. Raises BadInput."""
    return _merge([(str(path), OmegaConf.create(_as_it_is(dict(saved)))), ("command line", _given(overrides))])[0]


def _as_it_is(value: Any) -> Any:
    """A saved value for OmegaConf: `${` in a text, such as a chat template, is no longer the name of another key."""
    if isinstance(value, Mapping):
        return {key: _as_it_is(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_it_is(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\${", value) if isinstance(value, str) else value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of keys and values that is no config, as plain values. Raises BadInput."""
    try:
        return OmegaConf.to_object(_read(path))
    except OmegaConfBaseException as error:  # what ${...} names is not there
        raise BadInput(f"{path}: {_one_line(error)}") from error


def with_overrides(path: str | Path, overrides: Sequence[str]) -> str:
    """A config file with other values, as YAML that `load_config` reads. Raises BadInput as that does."""
    return OmegaConf.to_yaml(OmegaConf.merge(_read(path), _given(overrides)))


def _read(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such config file; the shipped ones are in conf/")
    try:
        in_file = OmegaConf.load(path)
    except Exception as error:  # the YAML reader's errors have no common base
        raise BadInput(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if not OmegaConf.is_dict(in_file):
        raise BadInput(f"{path}: a config file holds keys and values, such as run: and model:; this one holds a list")
    return in_file


def _given(overrides: Sequence[str]) -> Any:
    given = OmegaConf.create()
    for override in overrides:
        if override.startswith("=") or "=" not in override:
            raise BadInput(f"{override}: an override has the form key=value, for example spin.beta=0.1")
        try:
            given.merge_with_dotlist([f"{override}''" if override.endswith("=") else override])  # key= is the empty text
        except Exception as error:  # the YAML reader's errors have no common base, and bytes that are no text come here too
            shown = override.encode(errors="backslashreplace").decode()
            raise BadInput(f"command line: {shown}: not a value in YAML: {_one_line(error)}; quotes help, as in key='\"[text\"'") from error
    return given


def _preset(layers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The layer under all others, if one of them names a preset; a name that is none is left to be refused with the other values."""
    name = next((layer.preset for _, layer in reversed(layers) if "preset" in layer), "")
    return [(f"preset {name}", OmegaConf.load(PRESETS_FOLDER / f"{name}.yaml"))] if name in PRESETS else []


def _merge(layers: list[tuple[str, Any]]) -> tuple[Config, dict[str, str]]:
    known, origin = flatten(Config()), {}
    for source, layer in layers:
        for key in _leaves(layer, known):
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise BadInput(f"{source}: unknown key {key}; the nearest known key is {near}")
            origin[key] = source
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *[layer for _, layer in layers])
        for key, given in _mappings(layers, known):
            OmegaConf.update(merged, key, given, merge=False)
        _refuse_missing(merged, layers)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        hint = "; a list is written key=[a,b]" if "ListConfig" in str(error) else ""
        raise BadInput(f"{_one_line(error)}{_where(error, origin)}{hint}") from error
    check(config)
    return config, {key: origin.get(key, "default") for key in known}


def _mappings(layers: list[tuple[str, Any]], known: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Keys whose value is a mapping, as each layer has it: the last one counts whole, as a list does."""
    for _, layer in layers:
        for key in _leaves(layer, known):
            if OmegaConf.is_dict(given := OmegaConf.select(layer, key)):
                yield key, given


def _refuse_missing(merged: Any, layers: list[tuple[str, Any]]) -> None:
    """Name every key that must be given and is not, or that a file leaves to be given by ???."""
    missing: set[str] = set()
    for _, layer in layers:
        missing = missing - set(_leaves(layer, ())) | OmegaConf.missing_keys(layer)
    missing |= {key for key in REQUIRED if key in OmegaConf.missing_keys(merged) or OmegaConf.select(merged, key) == ""}
    if missing:
        names = [key for key in flatten(Config()) if key in missing]
        are, them = ("is", "it") if len(names) == 1 else ("are", "them")
        raise BadInput(
            f"{layers[-2][0]}: {' and '.join(names)} {are} not set (??? there is a placeholder); give {them} in the file or as "
            f"{' '.join(f'{key}=...' for key in names)}"
        )


def _leaves(layer: Any, known: Collection[str], prefix: str = "") -> list[str]:
    """Dotted keys of an OmegaConf node, down to what is a value of the schema: a list is one, and what a known key holds."""
    if not OmegaConf.is_dict(layer) or prefix.rstrip(".") in known:
        return [prefix.rstrip(".")] if prefix else []
    return [leaf for key in layer for leaf in (_leaves(layer._get_node(key), known, f"{prefix}{key}.") or [f"{prefix}{key}"])]


def _where(error: OmegaConfBaseException, origin: dict[str, str]) -> str:
    key = getattr(error, "full_key", None)
    return f" (key {key}, from {origin.get(key, 'default')})" if key else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("full_key")[0].split())
