"""Folders that libraries take for granted: a short one for sockets, and stand-ins for those in a home that cannot be written."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from spin_ray.config import Config
from spin_ray.errors import BadInput

LONGEST_FOLDER = 107 - len("/session_2026-11-28_05-22-49_123456_4194304/sockets/plasma_store.99")
"""Bytes of the folder in which Ray keeps its sockets: the system takes a path of 107."""
_IN_HOME = {"XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "XDG_DATA_HOME": ".local/share"}


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder of this process's own, for sockets, as RAY_TMPDIR and for vLLM; remove it at the end.

    Its path has at most LONGEST_FOLDER bytes, and only this user may enter it. After an error it stays for what still runs, until
    `remove_short_folder`. Raises BadInput if no place admits that.
    """
    folder = _make_short_folder()
    given = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "VLLM_RPC_BASE_PATH")}
    os.environ["RAY_TMPDIR"] = str(folder)
    os.environ.setdefault("VLLM_RPC_BASE_PATH", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    for name, value in given.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def remove_short_folder() -> None:
    """For a process that ends, when all that it started has ended."""
    folder = Path(os.environ.get("RAY_TMPDIR", ""))
    if folder.name.startswith(_prefix()):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix() -> str:
    return f"spin-{os.getpid()}-"


def _make_short_folder() -> Path:
    tried = _places()
    for place in tried:
        if len(os.fsencode(place)) + len(f"/{_prefix()}12345678") <= LONGEST_FOLDER:
            try:
                folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=place))
            except OSError:
                continue
            if _takes_sockets(folder):
                return folder
            shutil.rmtree(folder, ignore_errors=True)
    longest = LONGEST_FOLDER - len(f"/{_prefix()}12345678")
    raise BadInput(
        f"no place for Ray's sockets: none of {', '.join(tried)} can be written, takes sockets and has a short enough name; "
        f"set TMPDIR to a folder of at most {longest} characters"
    )


def _places() -> list[str]:
    """Where temporary files may go, the user's wish first."""
    named = [os.environ.get(name, "") for name in ("RAY_TMPDIR", "TMPDIR")]
    return list(dict.fromkeys([place for place in named if os.path.isabs(place)] + ["/tmp", "/var/tmp", "/dev/shm"]))


def _takes_sockets(folder: Path) -> bool:
    """Some network and shared file systems do not."""
    path = folder / "probe"
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
    except OSError:
        return False
    return True


def spill_folder(short: Path) -> str | None:
    """Where Ray puts what does not fit into memory, if that is not beside the sockets: TMPDIR, where its name is too long for them."""
    wanted = os.environ.get("TMPDIR", "")
    return wanted if os.path.isabs(wanted) and short.parent != Path(wanted) and can_write(Path(wanted)) else None


def stand_in_for_home() -> None:
    """Let caches, settings and Ray's token go to a folder of this user's under a temporary one, if the home cannot be written.

    What can be read in the home (models, W&B's key) is still read there. Says so in one line. Raises BadInput if there is no such
    place either.
    """
    _name_this_user()
    home = Path(os.path.expanduser("~"))
    shut = {name: folder for name, folder in _IN_HOME.items() if not can_write(Path(os.environ.get(name) or home / folder))}
    no_token = not os.environ.get("RAY_ADDRESS") and not _has_ray_token(home) and not can_write(home / ".ray")
    if not (shut or no_token):
        return
    stand_in, changed = _stand_in_folder(), {}
    hugging_face = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    if not can_write(hugging_face) and hugging_face.is_dir():
        changed["HF_HOME"] = str(hugging_face)
        changed |= {f"HF_{what}_CACHE": str(stand_in / f".cache/huggingface/{what.lower()}") for what in ("DATASETS", "MODULES")}
    changed |= {name: str(stand_in / folder) for name, folder in shut.items()}
    if not can_write(home):
        changed |= {"TRITON_CACHE_DIR": str(stand_in / ".triton/cache")}
    if (home / ".config/wandb").is_dir():
        changed["WANDB_CONFIG_DIR"] = str(home / ".config/wandb")
    if no_token:
        changed["RAY_AUTH_TOKEN_PATH"] = str(_ray_token(stand_in))
    own_ones = {name for name in changed if os.environ.get(name) and name not in shut}
    os.environ.update({name: value for name, value in changed.items() if name not in own_ones})
    print(f"spin-ray: {home} cannot be written: caches and Ray's token go to {stand_in}", file=sys.stderr)


def can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is not there; what permissions say is not the whole truth."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def nothing_left_if_refused(folder: Path) -> Iterator[None]:
    """After BadInput in the body, remove a folder that was not there before and holds nothing but what every command begins with.

    What another process has begun there meanwhile stays.
    """
    before = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BadInput:
        if before:
            _remove_unless_used(folder)
            for parent in before[1:]:
                with suppress(OSError):  # others have put something there
                    parent.rmdir()
        raise


def _remove_unless_used(folder: Path) -> None:
    """Under the run's lock: nobody is at work there, and nobody begins before the folder is gone."""
    from spin_ray.storage import DISK  # not at the top: it loads pyarrow

    with suppress(OSError):  # there is no folder, or somebody has the lock
        if not any((folder / name).exists() for name in _WORK) and not DISK.read(folder / "lock").strip():  # an owner's record
            with DISK.flock(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)


_WORK = ("manifest.jsonl", "trials", "prompts")
"""Of a run, or a search: one of these is there once something has been made that can be gone on with."""


def check_run_folder(config: Config) -> None:
    """Raise BadInput if the run's folder, which is made here, cannot be written."""
    if not can_write(config.run_path):
        key = "run.scratch" if config.on_object_store else "run.dir"
        raise BadInput(f"{key}: {config.run_path} cannot be written; give another {key}, or mend that one")


def _name_this_user() -> None:
    """A container may run under a number that has no name and no home; libraries ask for both."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        for name in ("USER", "LOGNAME"):
            os.environ.setdefault(name, f"user{os.getuid()}")
        os.environ.setdefault("HOME", "/")


def _stand_in_folder() -> Path:
    tried = [Path(place) / f"spin_ray-{os.getuid()}" for place in _places()]
    for folder in tried:
        if can_write(folder) and _is_private(folder):
            return folder
    raise BadInput(
        f"neither the home {os.path.expanduser('~')} nor any of {', '.join(map(str, tried))} can be written by this user alone; "
        "set HOME or TMPDIR to a folder that can"
    )


def _is_private(folder: Path) -> bool:
    """Whether it is this user's own, who then shuts it to all others; another one may have made it before, or a link of that name."""
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        return False
    folder.chmod(0o700)
    return True


def _has_ray_token(home: Path) -> bool:
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.access(home / ".ray/auth_token", os.R_OK)


def _ray_token(folder: Path) -> Path:
    """A file with a token as Ray would make one in the home."""
    path = folder / "ray_auth_token"
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.replace(temporary, path)
    return path


BUILD_BEGINS_S = 30.0
"""So long after its lock is there, torch has begun to build an extension: its compilers are at work in the lock's folder."""


def drop_left_build_locks() -> None:
    """Remove what would have every later process wait for ever: DeepSpeed has torch build a small extension, under a lock file.

    Returns when there is none: one that is used is waited for, one that was left by a process that is gone is removed.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/lock"):
        with suppress(OSError):  # whoever had it has removed it
            while time.time() - lock.stat().st_mtime < BUILD_BEGINS_S or _is_at_work_in(lock.parent):
                time.sleep(0.5)
            lock.unlink()


def _is_at_work_in(folder: Path) -> bool:
    """Whether a process of this machine has this working directory."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()).samefile(folder):
                return True
    return False
