"""A run's directory: where everything lies, and the append-only manifest that says what is finished.

Publish, then mark: data is written under a temporary name, renamed, and only then named in manifest.jsonl.
Readers believe only the mark (and a block's final name, which is a mark of its own).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin_ray.background import every
from spin_ray.config import Config, RunConfig, differences, to_json
from spin_ray.errors import BadInput
from spin_ray.lock import held
from spin_ray.storage import DISK, Disk, open_storage, readable_disk_errors

_MARKING = threading.Lock()
"""Threads of one process mark stages side by side; `RunDir.locked` keeps other processes out."""
_APPENDED = ("metrics.jsonl", "timeline.jsonl")
_DRAWN = ("timeline.png", "wandb_id", "wandb", "logs")
"""What the driver's own disk collects; an object store gets it every UPLOAD_S and at the end."""
UPLOAD_S = 60.0
CARD = "README.md"
"""In a model's folder: what people read of it, written anew when more is known."""


def append_line(path: Path, line: str) -> None:
    """Append a line with its end, whole and on disk when this returns; one that a crash cut short goes."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


class RunDir:
    """runs/<name>. `open` makes it, or takes up the one that an earlier, equal run left behind.

    Pickles. A file or a folder that another process may have written is fetched by `storage` before it is read.
    """

    def __init__(self, path: Path, storage: Disk = DISK):
        self.path, self.storage = path, storage

    def __str__(self) -> str:
        return self.storage.name(self.path)

    @classmethod
    def open(cls, config: Config) -> RunDir:
        """Raises BadInput if the directory cannot be written or holds the work of a run with another config.

        One that holds no work yet, because an earlier try ended in bad input, is simply started over.
        """
        run = cls(config.run_path, open_storage(config))
        with readable_disk_errors(run.path), held(run.storage, run.path / "lock"):
            run._take_up(config)
        return run

    def _take_up(self, config: Config) -> None:
        saved = self.storage.fetch(self.path / "config.json")
        before = self._parse(saved) if saved.exists() else {}
        changed = differences(config, before) if before else []
        if changed and self.storage.exists(self.iteration(0)):
            raise BadInput(
                f"{self} belongs to a run with another config ({'; '.join(changed)}); "
                "set that back to go on, choose another run.name, or delete the directory to start over"
            )
        self.logs.mkdir(parents=True, exist_ok=True)
        if changed:
            self.storage.remove(self.path / "manifest.jsonl")
        more = bool(before) and not changed and config.method == "spin" and config.spin.num_iterations > before["spin"]["num_iterations"]
        if more and self.storage.fetch(self.path / "manifest.jsonl").exists():
            self.mark("extended", num_iterations=config.spin.num_iterations)
        if changed or more or not saved.exists():
            with self.storage.written(saved) as temporary:
                temporary.write_text(to_json(config))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this directory; the lock goes with the process, however it ends.

        Raises BadInput, naming it, if another one has it. Removes what a killed process left half-written.
        """
        with held(self.storage, self.path / "lock"):
            self._remove_half_written()
            for name in ("manifest.jsonl", "wandb_id"):
                self.storage.fetch(self.path / name)
            for name in _APPENDED:
                self.storage.fetch_longer(self.path / name)
            with every(UPLOAD_S, self._publish_followed):
                yield
            self._remove_half_written()  # by processes that died on the way and were replaced

    def _remove_half_written(self) -> None:
        for leftover in self.path.rglob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def _publish_followed(self) -> None:
        for name in (*_APPENDED, *_DRAWN):
            try:
                self.storage.publish(self.path / name)
            except BadInput as error:  # W&B's files come and go; the others must not wait for them
                logging.getLogger(__name__).warning("%s", error)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def said(self) -> Path:
        """Every line that the user was told, with its time (UTC)."""
        return self.logs / "said.log"

    def prompts(self, block: int) -> Path:
        return self.prepared() / f"block_{block:05d}.parquet"

    def heldout(self) -> Path:
        return self.prepared() / "heldout.parquet"

    def heldout_answers(self, version: int) -> Path:
        """What theta_version answered to the held-out prompts."""
        return self.path / "heldout" / f"theta_{version:03d}.parquet"

    @property
    def finished(self) -> bool:
        """Whether all that was asked for is done; a run that was finished may have been asked for more since."""
        return (self.marks("finished", "extended") or [{"stage": ""}])[-1]["stage"] == "finished"

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Held-out metrics of every version that has been evaluated."""
        return {mark["version"]: mark["metrics"] for mark in self.marks("evaluation")}

    @property
    def stop_file(self) -> Path:
        """A file that somebody puts there to end the run when a version has been evaluated; its text is the reason."""
        return self.path / "stop"

    def name_best(self, named: str) -> None:
        """Let the file `best` name a model."""
        path = self.storage.fetch(self.path / "best")
        if not path.exists() or path.read_text().strip() != named:
            with self.storage.written(path) as temporary:
                temporary.write_text(f"{named}\n")

    def best(self) -> str | None:
        """The model that `best` names; None where nothing was evaluated."""
        path = self.storage.fetch(self.path / "best")
        return path.read_text().strip() if path.exists() else None

    def prepared(self) -> Path:
        """All prompts."""
        return self.path / "prompts"

    def pairs(self, iteration: int, kind: str, block: int) -> Path:
        """`kind` is "block" for pairs sampled in this iteration, "replay" for re-scored ones of the iteration before."""
        return self.iteration(iteration) / "pairs" / f"{kind}_{block:05d}.parquet"

    def has_pairs(self, iteration: int, kind: str, block: int) -> bool:
        return self.storage.exists(self.pairs(iteration, kind, block))

    def iteration(self, iteration: int) -> Path:
        return self.path / f"iter_{iteration:03d}"

    def model(self, iteration: int) -> Path:
        return self.iteration(iteration) / "model"

    def adapter(self, iteration: int) -> Path:
        return self.iteration(iteration) / "adapter"

    def first_adapter(self) -> Path:
        """theta_0's, where none was given."""
        return self.path / "start" / "adapter"

    def quantized_base(self) -> Path:
        """Of all versions, where `model.quantization` is set."""
        return self.path / "start" / "base"

    def checkpoint(self, iteration: int) -> Path:
        return self.iteration(iteration) / "checkpoint"

    def progress(self, iteration: int) -> Path:
        """The main player in the middle of an iteration."""
        return self.iteration(iteration) / "progress"

    def mark_checksums(self, iteration: int, folders: Sequence[Path]) -> None:
        """Remember what the files of an iteration's weights contain. `folders` lie in the iteration's."""
        self.mark("checksums", iteration=iteration, sha256=self._checksums(iteration, folders))

    def _checksums(self, iteration: int, folders: Sequence[Path]) -> dict[str, str]:
        here = self.iteration(iteration)
        found = ((folder / name, value) for folder in folders for name, value in self.storage.checksums(folder).items())
        return {str(path.relative_to(here)): value for path, value in found if path.name != CARD}

    def check_weights(self, iteration: int, folders: Sequence[Path]) -> None:
        """Raise BadInput, naming the file, if one that was written with an iteration is not what it was."""
        known = [mark["sha256"] for mark in self.marks("checksums") if mark["iteration"] == iteration]
        if not known:
            return self.mark_checksums(iteration, folders)  # a crash came between the iteration's mark and this one
        here, found = self.iteration(iteration), self._checksums(iteration, folders)
        for name, value in known[-1].items():
            if found.get(name) != value:
                raise BadInput(
                    f"{self.storage.name(here / name)}: missing or damaged since this run wrote it "
                    f"(sha256 {found.get(name)}, was {value}); put the file back, or start a new run"
                )

    def drop_outdated(self, keep: RunConfig, needed: Collection[int]) -> None:
        """Remove what finished iterations no longer need and the user does not keep. `needed`: iterations whose pairs the next reads."""
        finished = len(self.marks("iteration"))
        for t in range(finished):
            for path, outdated in (
                (self.progress(t), True),
                (self.checkpoint(t), t < finished - keep.keep_checkpoints),
                (self.iteration(t) / "pairs", keep.keep_pairs_iterations and t < finished - keep.keep_pairs_iterations and t not in needed),
            ):
                if outdated:
                    self.storage.remove(path)

    def mark(self, stage: str, **facts: Any) -> None:
        """Append one line to the manifest, whole and where it lies for good when this returns."""
        line, path = json.dumps({"stage": stage, **facts}) + "\n", self.path / "manifest.jsonl"
        with _MARKING, readable_disk_errors(path):
            append_line(path, line)
            self.storage.publish(path)

    def _parse(self, path: Path, line: bytes | None = None) -> dict[str, Any]:
        """The JSON of a file, or of one of its lines."""
        try:
            return json.loads(path.read_bytes() if line is None else line)
        except ValueError as error:
            remedy = "put the file back, or start a new run"
            raise BadInput(f"{self.storage.name(path)}: damaged since this run wrote it ({error}); {remedy}") from error

    def marks(self, *stages: str) -> list[dict[str, Any]]:
        """Lines of these stages, oldest first; a line cut by a crash is not believed."""
        manifest = self.path / "manifest.jsonl"
        lines = manifest.read_bytes().splitlines(keepends=True) if manifest.exists() else []
        entries = [self._parse(manifest, line) for line in lines if line.endswith(b"\n")]
        return [entry for entry in entries if entry["stage"] in stages]
