"""The errors that the command line prints as one line; every other one is a bug and keeps its traceback."""


class BadInput(ValueError):
    """Wrong config, data, model or cluster; the message says what is wrong, where, and what to do. Exit code 2."""


class RunStopped(RuntimeError):
    """One of the run's own checks stopped it; the message has the numbers. Exit code 1."""


class Enough(Exception):
    """The run ends before its last iteration because it has nothing more to gain; the message says why. Exit code 0."""


class Diverged(RunStopped):
    """A loss or a gradient that is not a number, or a metric that exploded."""


def in_one_line(error: BaseException) -> str:
    """What an error says: of one that holds another one's traceback, the cause at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class EngineFailed(RunStopped):
    """A sampler's engine is broken: nothing that was asked of it will be answered, and nothing will be until it starts anew."""


class TransferFailed(EngineFailed):
    """New weights did not get into an engine by `weights.transport`: its process may be blocked in it for good, and starts anew."""


class WeightsLost(RunStopped):
    """Published weights cannot be had: the learner's worker that held them died before a sampler had loaded them, or they are late."""


class WeightsLate(WeightsLost):
    """Published weights do not reach a sampler's host, or too slowly: the learner's worker may well be alive."""


class WrongVersion(RunStopped):
    """A sampler was asked for weights that it does not hold (invariant 4)."""
