"""`spin-ray report`, and the report that a run writes of itself at every iteration's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.look.report.compare import side_by_side
from spin_ray.look.report.page import page_of_one, page_of_several
from spin_ray.look.report.samples import Decode, Samples, samples_of
from spin_ray.look.report.story import Story, stories_in
from spin_ray.look.stored import Stored
from spin_ray.manifest import RunDir
from spin_ray.tokenizer import as_text, load_tokenizer

NAME = "report.html"
IN_A_RUN = 100
"""Samples of a report that a run writes: it has better things to do."""


def report(places: Sequence[str], out: str = "") -> Path:
    """Write one page about a run, or about several side by side; returns where it is. Raises BadInput."""
    found = [story for where in places for story in stories_in(where)]
    if len(found) == 1 and not Path(places[0], "trials").is_dir():
        own, complaint = _samples(found[0])
        text, path = page_of_one(found[0], own, complaint), found[0].run.path / NAME
    else:
        text, path = _of_several(places, found)
    path = Path(out) if out else path
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: the report cannot be written ({error.strerror}); give another place by --out") from error
    return path


def _of_several(places: Sequence[str], found: Sequence[Story]) -> tuple[str, Path]:
    told = [_samples(story) for story in found]
    both, complaint = side_by_side(found, [own for own, _ in told])
    folder = Path(places[0]) if len(places) == 1 else None
    title = folder.resolve().name if folder else " beside ".join(story.name for story in found[:3])
    return page_of_several(title, found, both, complaint or next((why for _, why in told if why), "")), (folder or Path()) / NAME


def _samples(story: Story) -> tuple[Samples, str]:
    """A run's answers, or why they cannot be shown."""
    try:
        tokenizer, _ = load_tokenizer(resolve(story.config["model.path"]), bool(story.config.get("model.trust_remote_code")))
    except BadInput as error:
        return Samples("", [], []), f"The answers of {story.name} cannot be shown: {error}"
    return samples_of(story, as_text(tokenizer)), ""


def write_own(run: RunDir, decode: Decode) -> None:
    """A run's report about itself, in its folder, as far as it has got."""
    story = Story(Stored(run))
    with run.storage.written(run.path / NAME) as temporary:
        temporary.write_text(page_of_one(story, samples_of(story, decode, IN_A_RUN)), encoding="utf-8")
