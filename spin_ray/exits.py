"""How a command ends: its exit code, and one line about why. An error that nobody foresaw leaves its traceback in a file."""

from __future__ import annotations

import os
import re
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from spin_ray.errors import BadInput, Enough, RunStopped
from spin_ray.interrupt import Interrupted

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
PACKAGE = Path(__file__).parent
LONGEST_TEXT = 400
"""Characters of an error's own text that a line repeats."""
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TITLE = re.compile(r"ray::(\w+)")
_PROCESSES = {
    "Sampler": "a sampler", "SamplerPool": "the sampler pool", "Coordinator": "the coordinator", "RayTrainWorker": "a learner worker",
    "TrainController": "Ray Train's controller",
}
_INTERRUPTED = "interrupted; the same command goes on"
_LOG_NOTE = "spin_ray wrote the traceback to "


def ends_in_one_line(program: str, work: Callable[[], int], *, only_prints: bool = False) -> int:
    """Do the work and return its exit code, or that of what it raises, which goes to standard error as one line.

    A command that `only_prints` is done when nobody reads on: `spin-ray config FILE | head`.
    If Ray is up then, this process ends at once, and every process that it started with it.
    """
    _open_missing_streams()
    try:
        return work()
    except SystemExit:  # of a command's own options
        raise
    except BaseException as error:  # a panic in one of the tokenizers is no Exception
        code, message = _verdict(error)
        if only_prints and isinstance(error, BrokenPipeError):
            return 0
    if code:
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            print(f"{program}: {message}", file=sys.stderr, flush=True)
    if "ray" in sys.modules:
        from spin_ray.system import leave

        leave(code)
    return code


def _open_missing_streams() -> None:
    """Let a standard stream that was closed before we began (`>&-`) be one that leads nowhere; a file opened later would take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            lead_nowhere(number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (it stays open as long as we live)


def lead_nowhere(number: int) -> None:
    """Let a file descriptor, open or not, take and give nothing."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def flush_output() -> None:
    """Flush what was printed; a reader who is gone, or a full disk, is no reason to fail where something else is being ended."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and line of an error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, _INTERRUPTED
    cause = _cause(error)
    if isinstance(cause, Enough):
        return 0, ""  # the run has said it
    if isinstance(cause, (BadInput, RunStopped)) and (text := _text(cause, whole=True)):
        code = EXIT_BAD_INPUT if isinstance(cause, BadInput) else EXIT_FAILED
        return EXIT_INTERRUPTED if isinstance(cause, Interrupted) else code, text
    if isinstance(cause, BrokenPipeError) and _nobody_reads():
        _let_output_vanish()
        return EXIT_FAILED, "stopped: whoever read the output is gone; the same command goes on"
    return EXIT_FAILED, f"{describe(error, cause)}; {_where_it_is_written(error)}"


def why_it_ends(error: BaseException) -> str:
    """What the user will be told of an error that ends a run, without where its traceback is; empty for a run that has said it itself."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    cause = _cause(error)
    if isinstance(cause, Enough):
        return ""
    foreseen = isinstance(cause, (BadInput, RunStopped)) and _text(cause, whole=True)
    return foreseen or describe(error, cause)


def _cause(error: BaseException) -> BaseException:
    """What it began with: of an error from an actor Ray makes one that is both, its type and RayError."""
    if "ray" not in sys.modules:
        return error
    from spin_ray.system import first_error

    return first_error(error)


def describe(error: BaseException, cause: BaseException) -> str:
    """What and where, in one line: `KeyError: 'x' (spin_ray/data.py:12, in a sampler)`.

    `cause` is what `error`, with all that Ray wraps around it, began with.
    """
    text = _text(cause)
    return f"{type(cause).__name__}{f': {text}' if text else ''} ({_place(error)}, in {_process(error)})"


def log_traceback(error: BaseException, path: str | Path) -> None:
    """Append the traceback to a log, and let the error know that it is there. A disk that is full leaves it to the command's end."""
    with suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
        traceback.print_exception(error, file=log)
        log.flush()
        error.add_note(f"{_LOG_NOTE}{path}")


def _where_it_is_written(error: BaseException) -> str:
    """Where the traceback is; writes it where nothing else has. A home for it is the last thing to fail over."""
    for note in getattr(error, "__notes__", []):
        if note.startswith(_LOG_NOTE):
            return f"traceback in {note.removeprefix(_LOG_NOTE)}"
    try:
        number, path = tempfile.mkstemp(prefix=time.strftime("spin-ray-%Y%m%d-%H%M%S-"), suffix=".log")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        return f"traceback in {path}"
    except OSError as unwritable:
        traceback.print_exception(error, file=sys.stderr)
        return f"its traceback, above, could not be written to a file: {unwritable.strerror}"


def _text(error: BaseException, *, whole: bool = False) -> str:
    """What an error says, in one line; of one that nobody foresaw not more than LONGEST_TEXT characters."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        return "(an error whose own text cannot be read)"
    return text if whole or len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()} ..."


def _chain(error: BaseException) -> Iterator[tuple[BaseException, int | None]]:
    """The error and all that it wraps, outermost first, with the rank of the learner's worker that an error came from."""
    seen: set[int] = set()
    inner: BaseException | None = error
    rank = None
    while isinstance(inner, BaseException) and id(inner) not in seen:
        seen.add(id(inner))
        yield inner, rank
        failures = getattr(inner, "worker_failures", None) or {}
        rank = next(iter(failures), rank)
        inner = next(iter(failures.values()), None) or getattr(inner, "cause", None) or inner.__cause__


def _place(error: BaseException) -> str:
    """File and line of the innermost frame that is ours, in whatever process it was; else of the innermost one."""
    frames: list[tuple[str, str]] = []
    for each, _ in _chain(error):
        frames += [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(each.__traceback__)]
        frames += _FRAME.findall(_told(each))
    ours = [frame for frame in frames if Path(frame[0]).is_relative_to(PACKAGE) and Path(frame[0]).name != Path(__file__).name]
    if not (ours or frames):
        return "place unknown"
    file, line = (ours or frames)[-1]
    return f"{Path(file).relative_to(PACKAGE.parent) if ours else file}:{line}"


def _told(error: BaseException) -> str:
    """The traceback, as text, that an error of Ray's brings from another process; it begins with that process's title."""
    if not any(kind.__module__.startswith("ray.") for kind in type(error).__mro__):
        return ""
    return str(getattr(error, "_traceback_str", "") or error)


def _process(error: BaseException) -> str:
    where = "the driver"
    for each, rank in _chain(error):
        if title := _TITLE.search(_told(each)):
            where = _PROCESSES.get(title[1], f"Ray's process {title[1]}")
        where = where if rank is None else f"learner rank {rank}"
    return where


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    waiting = select.poll()
    waiting.register(1, 0)
    return any(events & (select.POLLERR | select.POLLNVAL) for _, events in waiting.poll(0))


def _let_output_vanish() -> None:
    """What is still in the buffer must not fail again at the interpreter's end."""
    lead_nowhere(1)
