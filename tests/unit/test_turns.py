"""Who holds the devices: no Ray, no device."""

import pytest

from spin_ray.errors import BadInput
from spin_ray.turns import Turns, check_shared


class Said:
    """A player that says what it is told, and may fail at it."""

    def __init__(self, name, log, fails=""):
        self._name, self._log, self._fails = name, log, fails

    def _do(self, what):
        self._log.append(f"{self._name} {what}")
        if what == self._fails:
            raise RuntimeError(f"{self._name} cannot {what}")

    def rest(self):
        self._do("rest")

    def wake(self):
        self._do("wake")


def turns(log, **fails):
    return Turns({name: Said(name, log, fails.get(name, "")) for name in ("a", "b", "c")}, "a")


def test_one_rests_before_the_other_wakes():
    log = []
    taken = turns(log)
    for name in ("b", "b", "c", "a"):
        taken.give_to(name)
        assert taken.holder == name
    assert log == ["a rest", "b wake", "b rest", "c wake", "c rest", "a wake"]


def test_nobody_wakes_beside_a_holder_that_cannot_rest():
    log = []
    taken = turns(log, a="rest")
    with pytest.raises(RuntimeError, match="a cannot rest"):
        taken.give_to("b")
    assert taken.holder == "a" and log == ["a rest"]


def test_who_cannot_wake_holds_what_the_other_has_given_away():
    taken = turns([], b="wake")
    with pytest.raises(RuntimeError, match="b cannot wake"):
        taken.give_to("b")
    assert taken.holder == "b"


def gpus(*numbers, node="aaaaaaaaaaaa"):
    return tuple((node, number) for number in numbers)


@pytest.mark.parametrize("samplers, workers", [((), ()), (gpus(0), gpus(0)), (gpus(0, 1), gpus(1, 0)), (gpus(1), gpus(0, 1)), (gpus(0, 1), gpus(0))])
def test_shared_devices_are_let_pass(samplers, workers):
    check_shared(samplers, workers)


@pytest.mark.parametrize("samplers, workers, says", [
    (gpus(0, 0), gpus(0), r"two samplers were given the same GPU \(0 of node aaaaaaaa\)"),
    (gpus(0), gpus(1, 1), "two workers of the main player were given the same GPU"),
    (gpus(0), gpus(1), "gave a sampler the GPU 0 of node aaaaaaaa and the main player 1 of node aaaaaaaa: they share none"),
    (gpus(0), gpus(0, node="bbbbbbbbbbbb"), "0 of node aaaaaaaa and the main player 0 of node bbbbbbbb"),
])
def test_devices_that_are_not_shared_are_named(samplers, workers, says):
    with pytest.raises(BadInput, match=says):
        check_shared(samplers, workers)
