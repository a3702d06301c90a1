"""Where metrics go: every one to metrics.jsonl, and the same to Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spin_ray.config import Config, flatten
from spin_ray.errors import BadInput, Enough, in_one_line
from spin_ray.imports import without_gc
from spin_ray.storage import readable_disk_errors

_REMEDY = "set WANDB_API_KEY (or run `wandb login`), or take tracking.wandb.mode=offline and upload later with `wandb sync`"


def check_wandb(config: Config) -> None:
    """Before anything starts: raise BadInput if W&B is to be used online and its server does not take this user's key.

    The key is looked up where W&B does, and the server is asked, which takes at most ten seconds.
    """
    mode = wandb_mode(config)
    if mode not in ("online", "offline", "disabled"):
        raise BadInput(f"WANDB_MODE={mode}: choose one of online, offline, disabled")
    if mode != "online":
        return
    with without_gc():
        import wandb

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # W&B says where the key is from
            has_key = wandb.login(prompt=False, verify=True)
    except wandb.errors.Error as error:
        raise BadInput(f"Weights & Biases: {' '.join(str(error).split())}; {_REMEDY}") from error
    if not has_key:
        raise BadInput(f"Weights & Biases: tracking.wandb.mode is online and there is no key; {_REMEDY}")


def wandb_mode(config: Config) -> str:
    """online, offline or disabled: the environment's WANDB_MODE, or the config's."""
    given = os.environ.get("WANDB_MODE") or config.tracking.wandb.mode
    return {"run": "online", "dryrun": "offline"}.get(given, given)  # W&B's words of old


class Tracker:
    """One per run, in the driver. A resumed run goes on in the same W&B run.

    W&B has a process of its own. One that dies ends no run, which `say` is told: `ray job stop` sends its signal to all processes of a
    job, and the run must still save what it has.
    """

    def __init__(self, config: Config, run_path: Path, say: Callable[[str], None] = print):
        with without_gc():
            import wandb

        self._lock, self._say, self._lost = threading.Lock(), say, False
        self._config = config
        self._file = (run_path / "metrics.jsonl").open("a", buffering=1)
        try:
            self._wandb = wandb.init(
                mode=wandb_mode(config), project=config.tracking.wandb.project, entity=config.tracking.wandb.entity or None,
                group=config.tracking.wandb.group or None, tags=[config.method, *config.tracking.wandb.tags],
                name=config.run.name, id=_stable_id(run_path / "wandb_id"), resume="allow", dir=str(run_path), config=flatten(config),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
            )
        except wandb.errors.Error as error:
            raise BadInput(f"Weights & Biases: {in_one_line(error)}; {_REMEDY}") from error
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("train/*", step_metric="train/global_step")
        for group in ("iteration", "eval", "tasks", "audit", "sync", "sampler"):
            self._wandb.define_metric(f"{group}/*", step_metric="opponent_version")

    def log(self, group: str, metrics: Mapping[str, Any], **stamp: int) -> None:
        """Log `metrics` under `group/`, stamped with where in the run they belong (iteration, step, opponent_version)."""
        named = {f"{group}/{name}": value for name, value in metrics.items()}
        with self._lock, readable_disk_errors(Path(self._file.name)):  # the players' threads log side by side
            self._file.write(json.dumps({"time": round(time.time(), 3), **stamp, **named}) + "\n")
            self._send({**stamp, **{name: self._for_wandb(value) for name, value in named.items()}})

    def _send(self, values: Mapping[str, Any]) -> None:
        if not self._lost:
            with self._noting_its_end():
                self._wandb.log(values)

    @contextlib.contextmanager
    def _noting_its_end(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            self._lost = True
            self._say(
                f"Weights & Biases' own process has ended ({in_one_line(error)}): from here on metrics are in metrics.jsonl alone, "
                "until the same command goes on"
            )

    @staticmethod
    def _for_wandb(value: Any) -> Any:
        """A list is a histogram of the margin: shares between `MARGIN_EDGES`."""
        if not isinstance(value, list):
            return value
        import numpy as np
        import wandb

        from spin_ray.losses import MARGIN_EDGES

        edges = 2 * MARGIN_EDGES[0], *MARGIN_EDGES, 2 * MARGIN_EDGES[-1]  # the outer bins have no end; a picture needs one
        return wandb.Histogram(np_histogram=(np.array(value), np.array(edges)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table, to W&B only."""
        import wandb

        with self._lock:
            self._send({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def image(self, name: str, path: Path) -> None:
        """A picture, to W&B only."""
        import wandb

        with self._lock:
            self._send({name: wandb.Image(str(path))})

    def model(self, version: int, name: str, folder: Path | None, facts: Mapping[str, Any]) -> None:
        """theta_version as an artifact of the run, where the user wants that; theta_0 is what the run was made from.

        `name`: where it lies, for people; `folder`: the same on this machine's disk; None: only the name is kept. An offline run cannot
        use an artifact, so there the models' own metadata say what they were made from.
        """
        if not self._config.tracking.wandb.log_models or self._lost:
            return
        import wandb

        made_from = {"made_from": f"theta_{version - 1}", "theta_0": self._config.model.path} if version else {}
        metadata = {"version": version, "where": name, **made_from, **facts}
        artifact = wandb.Artifact(self._artifact_name(version), type="model", metadata=metadata)
        with self._lock, self._noting_its_end():
            if not version:
                artifact.add_reference(_as_url(name), checksum=False)
                take = self._wandb.use_artifact if wandb_mode(self._config) == "online" else self._wandb.log_artifact
                take(artifact)
                return
            if folder:
                artifact.add_dir(str(folder))
            else:
                artifact.add_reference(name, checksum=False)
            self._wandb.log_artifact(artifact, aliases=[f"theta_{version}"])

    def _artifact_name(self, version: int) -> str:
        """All versions that a run makes are versions of one artifact; its theta_0 is another."""
        return re.sub(r"[^\w.-]", "-", f"{self._config.run.name}-{'model' if version else 'theta_0'}")

    def file(self, path: Path) -> None:
        """A file as it is, to W&B only; a later one of its name takes its place."""
        with self._lock:
            if not self._lost and path.exists():
                with self._noting_its_end():
                    self._wandb.save(str(path), base_path=str(path.parent), policy="now")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        import wandb

        with self._lock:
            self._file.close()
            if not self._lost:
                with self._noting_its_end():
                    self._wandb.finish(exit_code=int(error is not None and not issubclass(error, Enough)))
            if self._lost:
                with contextlib.suppress(ConnectionError):
                    wandb.teardown()  # else it complains when Python ends


def _as_url(name: str) -> str:
    """Of a folder, or a name on the model hub."""
    if "://" in name:
        return name
    return Path(name).absolute().as_uri() if Path(name).exists() else f"https://huggingface.co/{name}"


def _stable_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
