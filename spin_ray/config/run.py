"""What a run is called, where it lies and what of it is kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from spin_ray.config.keys import at_least
from spin_ray.errors import BadInput

SECRET_WORDS = ("key", "secret", "token", "password", "sig", "credential")
"""A URL's query must have none of them in its names."""

@dataclass
class RunConfig:
    name: str = "spin"
    """Name of the run: its folder and its W&B run."""
    dir: str = "runs"
    """Folder that holds the run's folder; on several nodes a path they all see, or a URL: s3://bucket/runs, gs://, whatever
    pyarrow or fsspec knows. Credentials are the environment's, never part of it."""
    scratch: str = "~/.cache/spin_ray"
    """If run.dir is a URL: a folder on every node for what is on its way to or from there. May be deleted between runs."""
    seed: int = 0
    """Seed of the order of the data and of the sampler."""
    max_steps: int = at_least(0, 0)
    """Stop every iteration after this many optimizer steps, to try a config out; 0: no limit."""
    keep_pairs_iterations: int = at_least(0, 0)
    """Keep the pairs of this many newest iterations; 0: of all. What a later one replays is always kept."""
    keep_checkpoints: int = at_least(1, 1)
    """Keep the DeepSpeed checkpoints of this many newest iterations; only the newest is ever used. Models are all kept."""

    @property
    def on_object_store(self) -> bool:
        return "://" in self.dir

    @property
    def path(self) -> Path:
        """The run's folder; on an object store the one that stands for it on every node."""
        if self.on_object_store:
            place = Path(self.scratch).expanduser().absolute() / hashlib.sha256(self.dir.encode()).hexdigest()[:16]
        else:
            place = Path(self.dir).expanduser().absolute()
        return place / self.name

    def check(self) -> None:
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise BadInput(f"run.name={self.name!r}: must be a plain folder name")
        if self.on_object_store:
            _check_url(self.dir)
        elif (scheme := self.dir.partition(":/")[0]) != self.dir and scheme.isalnum():
            raise BadInput(f"run.dir={self.dir}: neither a path nor a URL; a URL begins with {scheme}://")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    secrets = [key for key in parse_qs(parts.query, keep_blank_values=True) if any(word in key.lower() for word in SECRET_WORDS)]
    in_s3 = parts.scheme.startswith("s3") and ("@" in url.partition("?")[0] or ":" in parts.netloc)  # a secret may hold a slash
    if secrets or in_s3 or parts.password is not None:
        what = ", ".join(secrets) or "a user or a password"
        raise BadInput(
            f"run.dir={parts.scheme}://...: holds credentials ({what}), which would be saved with the run and logged; "
            "leave them to the environment, such as AWS_PROFILE, or to the machine's role"
        )
    if parts.scheme == "file":
        raise BadInput(f"run.dir={url}: give a path on a disk without file://")
