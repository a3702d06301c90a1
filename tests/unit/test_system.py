"""What the user is told when the distributed parts fail."""

import ray

from spin_ray.errors import BadInput, EngineFailed, RunStopped
from spin_ray.system import first_error


def wrapped(error):
    outer = RuntimeError("somewhere in Ray")
    outer.__cause__ = error
    return outer


def test_the_first_error_is_under_all_wrappings():
    for error in (BadInput("a"), EngineFailed("b"), KeyError("c")):
        assert first_error(wrapped(wrapped(error))) is error


def test_a_dead_actor_is_one_line_that_says_how_to_go_on():
    error = first_error(wrapped(ray.exceptions.ActorDiedError()))
    assert isinstance(error, RunStopped) and "\n" not in str(error) and "the same command goes on" in str(error)
