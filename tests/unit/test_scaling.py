"""The policy that finds the number of samplers, beside players whose rates are known."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_ray.scaling import GROW_AFTER, SHRINK_AFTER, SLACK, Meter, Rates, Scale, Scaler, needed

RATE = st.floats(0.1, 1000)


def test_what_keeps_up_with_the_main_player():
    assert needed(Rates(drawn=10, scored=0, trained=25), new=1000, replayed=0) == 2.5
    assert needed(Rates(drawn=10, scored=50, trained=25), new=1000, replayed=1000) == pytest.approx((100 + 20) / 80)
    for unknown in (Rates(0, 50, 25), Rates(10, 50, 0), Rates(10, 0, 25)):
        assert needed(unknown, 1000, 1000) is None


@given(st.integers(1, 4), st.integers(0, 60), st.floats(0.01, 200), st.integers(1, 64))
def test_a_need_that_stays_is_met_exactly_and_then_nothing_changes(fewest, more, need, present):
    scale, most, seen = Scale(fewest, fewest + more), fewest + more, [min(max(present, fewest), fewest + more)]
    for _ in range(20 * (GROW_AFTER + SHRINK_AFTER)):
        seen.append(scale.wanted(seen[-1], need))
    clamp = lambda count: min(max(count, fewest), most)  # noqa: E731
    assert clamp(math.ceil(need - 1e-9)) <= seen[-1] <= max(clamp(math.ceil(need * (1 + SLACK))), clamp(math.ceil(need)))
    assert len(set(seen[-2 * SHRINK_AFTER :])) == 1
    assert all(fewest <= count <= most for count in seen)
    assert all(after <= 2 * before for before, after in itertools.pairwise(seen))


@given(st.floats(0.5, 40), st.integers(0, 2**32))
def test_noise_alone_does_not_make_samplers_come_and_go(need, seed):
    """At most between the number that is needed and the next one, and seldom."""
    rng, scale, present, changes = random.Random(seed), Scale(1, 64), max(1, math.ceil(need * 1.05)), 0
    for _ in range(200):
        wanted = scale.wanted(present, need * rng.uniform(0.96, 1.04))
        changes, present = changes + (wanted != present), wanted
    assert changes <= 2 and need * 0.96 <= present <= max(1, math.ceil(need * 1.2))


def test_nothing_changes_while_nothing_is_known():
    scale = Scale(1, 8)
    assert [scale.wanted(3, None) for _ in range(10)] == [3] * 10


def test_a_meter_counts_sampler_seconds():
    meter = Meter()
    assert meter.rate == 0.0
    for _ in range(100):
        meter.add(64, seconds=2.0, samplers=4)
    assert meter.rate == pytest.approx(8.0)


@pytest.mark.parametrize("drawn, trained, most, expected", [(10.0, 35.0, 16, 4), (10.0, 3.0, 16, 1), (10.0, 350.0, 8, 8), (3.0, 31.0, 64, 11)])
def test_the_right_number_is_found_by_what_is_measured(drawn, trained, most, expected):
    """Blocks come as fast as the samplers that are up play them; a new one takes a minute to come up."""
    clock, up, starting, largest = [0.0], [1], [], [0]

    def change(difference, need):
        if difference > 0:
            starting.extend([clock[0] + 60.0] * difference)
        else:
            up[0] += difference
        largest[0] = max(largest[0], up[0] + len(starting))

    scaler = Scaler(1, most, size=lambda: (up[0], up[0] + len(starting)), change=change, clock=lambda: clock[0])
    scaler.opened()
    for _ in range(3000):
        clock[0] += 64 / (drawn * up[0])
        while starting and starting[0] <= clock[0]:
            starting.pop(0)
            up[0] += 1
        scaler.trained(trained)
        scaler.played(64, replayed=False, new_in_all=10**6, replayed_in_all=0)
    assert up[0] == expected and not starting
    assert largest[0] <= math.ceil(min(most, trained / drawn * 1.1)) or largest[0] == expected
