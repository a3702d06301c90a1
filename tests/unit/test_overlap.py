"""The schedule of the overlap modes and its waits: no Ray, no model."""

import threading

import pytest

from spin_ray.config import Config, LearnerConfig, OverlapConfig, SpinConfig
from spin_ray.methods import method_of
from spin_ray.overlap import Overlap
from spin_ray.records import Version

SIZES = [4, 4, 4, 4, 3]


def overlap(mode, *, first=0, fraction=0.2, replay=1, max_steps=0):
    config = Config(
        spin=SpinConfig(num_iterations=3, replay=replay), learner=LearnerConfig(batch_pairs=8),
        overlap=OverlapConfig(mode=mode, lookahead_fraction=fraction),
    )
    config.run.max_steps = max_steps
    return Overlap(config, method_of(config), SIZES, first)


def kinds(blocks):
    return [(block.kind, block.index, str(block.version)) for block in blocks]


@pytest.mark.parametrize("mode", ["sequential", "stream"])
def test_exact_modes_play_everything_with_theta_t_and_replay_first(mode):
    schedule = overlap(mode)
    assert kinds(schedule.blocks(0)) == [("block", k, "theta_0") for k in range(5)]
    assert kinds(schedule.blocks(1)) == [("replay", k, "theta_1") for k in range(5)] + [("block", k, "theta_1") for k in range(5)]
    assert len(overlap(mode, replay=0).blocks(1)) == 5
    history = overlap(mode, replay=5)
    assert [block.kind for block in history.blocks(2)] == ["replay"] * 5 + ["replay2"] * 5 + ["block"] * 5
    assert history.num_steps(2) == 2 * -(-3 * 19 // 8) and [block.place for block in history.blocks(2)] == list(range(15))
    assert schedule.max_steps_early == 0 and schedule.snapshot(0) is None and not schedule.starts_stale(1)
    assert schedule.waits_for_all == (mode == "sequential")


def test_lookahead_plays_a_bounded_part_ahead_and_trains_on_it_first():
    schedule = overlap("lookahead")
    assert (schedule.num_steps(0), schedule.num_steps(1)) == (6, 10)  # 2 epochs of 19 and of 38 pairs, 8 at a time
    assert schedule.snapshot(0) == (4, Version(1, steps_early=2)) and schedule.snapshot(1) == (8, Version(2, 2))
    assert schedule.snapshot(2) is None  # nothing comes after the last iteration
    assert kinds(schedule.blocks(1))[:2] == [("block", 0, "theta_1 less 2 steps"), ("replay", 0, "theta_1")]
    assert [str(block.version) for block in schedule.blocks(1)].count("theta_1 less 2 steps") == 1
    assert schedule.max_steps_early == 2 and schedule.starts_stale(1) and not schedule.starts_stale(0)


def test_a_resumed_lookahead_starts_without_a_snapshot():
    schedule = overlap("lookahead", first=1)
    whole = overlap("lookahead")
    assert schedule.snapshot(0) is None and schedule.max_steps_early == whole.max_steps_early == 2
    assert [(b.kind, b.index, b.place) for b in schedule.blocks(1)] == [(b.kind, b.index, b.place) for b in whole.blocks(1)]  # its order stays
    assert {str(block.version) for block in schedule.blocks(1)} == {"theta_1"} and schedule.blocks(2) == whole.blocks(2)
    assert schedule.starts_stale(1)  # what the snapshot played before is still on disk
    assert overlap("lookahead", first=2).max_steps_early == 2


@pytest.mark.parametrize("mode", ["sequential", "stream", "lookahead"])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_every_prompt_once_per_iteration_in_every_mode(mode, fraction):
    schedule = overlap(mode, fraction=fraction)
    for t in range(3):
        for kind in ("block", "replay") if t else ("block",):
            own = [block for block in schedule.blocks(t) if block.kind == kind]
            assert sorted(block.index for block in own) == list(range(5)) and [block.iteration for block in own] == [t] * 5
            assert all(block.version.steps_early <= schedule.max_steps_early for block in own)


def test_max_steps_bounds_the_snapshot():
    assert overlap("lookahead", max_steps=3).snapshot(0) == (2, Version(1, 1))


def waiting(wait, *args):
    """Start `wait` in a thread; returns (thread, list that gets what it raised)."""
    raised = []

    def call():
        try:
            wait(*args)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, raised


def still_waits(thread):
    thread.join(timeout=0.05)
    return thread.is_alive()


def test_weights_are_loaded_only_when_earlier_ones_owe_nothing():
    schedule = overlap("lookahead")
    snapshot, _ = waiting(schedule.wait_until_may_load, Version(1, 2))
    theta_1, _ = waiting(schedule.wait_until_may_load, Version(1))
    for block in schedule.blocks(0):
        assert still_waits(snapshot) and still_waits(theta_1)
        schedule.block_played(block)
    snapshot.join(timeout=60)
    assert not snapshot.is_alive() and still_waits(theta_1)  # the block ahead is still to be played by the snapshot
    schedule.block_played(schedule.blocks(1)[0])
    theta_1.join(timeout=60)
    assert not theta_1.is_alive()


def test_evaluation_waits_for_the_play_of_its_own_version():
    schedule = overlap("stream")
    evaluation, _ = waiting(schedule.wait_until_may_evaluate, 0)
    assert still_waits(evaluation)
    for block in reversed(schedule.blocks(0)):  # whatever the order
        schedule.block_played(block)
    evaluation.join(timeout=60)
    assert not evaluation.is_alive()
    schedule.wait_until_may_evaluate(3)  # the last version plays nothing
    overlap("stream", first=2).wait_until_may_evaluate(1)  # played in an earlier session


def test_failure_ends_present_and_later_waits_with_the_first_error():
    schedule = overlap("stream")
    thread, raised = waiting(schedule.wait_until_may_load, Version(1))
    first = RuntimeError("first")
    schedule.fail(first)
    schedule.fail(RuntimeError("follow-up"))
    thread.join(timeout=60)
    assert raised == [first]
    with pytest.raises(RuntimeError, match="first"):
        schedule.wait_until_may_evaluate(0)
