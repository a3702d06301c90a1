"""The learner's order of things: batches, learning rate, the coordinator's contract. No Ray, no model."""

import asyncio
import itertools
from collections import Counter

import pytest

from spin_ray.learner.coordinator import Coordinator, Failure
from spin_ray.learner.loop import FirstLossError, Train, _check_first_loss, batches, learning_rate, num_steps


def command(sizes, *, epochs=2, shuffle=False, max_steps=0, expected=None):
    return Train(
        iteration=1, block_sizes=tuple(sizes), num_epochs=epochs, loss_fn=None, normalizer=len, lr=1.0,
        shuffle_first_epoch=shuffle, max_steps=max_steps, expected_first_loss=expected,
    )


def blocks(sizes):
    numbers = iter(range(sum(sizes)))
    return [[next(numbers) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("sizes", [[4, 4, 3], [1], [10], [2, 9]])
def test_every_pair_once_per_epoch_last_batch_smaller(sizes, shuffle):
    train, total = command(sizes, epochs=3, shuffle=shuffle), sum(sizes)
    found = list(batches(blocks(sizes), train, batch_pairs=4, seed=0))
    assert len(found) == num_steps(train, 4) == 3 * -(-total // 4)
    assert Counter(pair for batch in found for pair in batch) == {pair: 3 for pair in range(total)}
    per_epoch = len(found) // 3
    for epoch in range(3):
        taken = [pair for batch in found[epoch * per_epoch : (epoch + 1) * per_epoch] for pair in batch]
        assert sorted(taken) == list(range(total))


def test_stream_starts_before_the_last_block_and_keeps_their_order():
    seen = []

    def slow():
        for block in blocks([4, 4]):
            seen.append(block)
            yield block

    found = batches(slow(), command([4, 4]), batch_pairs=4, seed=0)
    assert next(found) == [0, 1, 2, 3] and len(seen) == 1


def test_later_epochs_are_shuffled_by_seed():
    def run(seed):
        return list(batches(blocks([8]), command([8]), batch_pairs=8, seed=seed))

    assert run(0) == run(0) and run(0)[1] != run(1)[1] and run(0)[0] == list(range(8)) != run(0)[1]


def test_missing_pairs_are_an_error():
    with pytest.raises(RuntimeError, match="3 pairs, expected 4"):
        list(batches([[0, 1, 2]], command([4]), batch_pairs=2, seed=0))


def test_max_steps():
    assert num_steps(command([100], max_steps=3), 4) == 3


def test_learning_rate_rises_then_falls_to_almost_zero():
    rates = [learning_rate(step, 20, peak=1.0, warmup_fraction=0.1) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(1 / 18)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[1:])) and min(rates) > 0
    assert learning_rate(0, 1, peak=1.0, warmup_fraction=0.1) == 1.0


def test_first_loss_is_checked():
    _check_first_loss(0.6935, command([1], expected=(0.6931, 1e-3)))
    with pytest.raises(FirstLossError, match=r"0\.800000, expected 0\.693100 ± 0\.001000"):
        _check_first_loss(0.8, command([1], expected=(0.6931, 1e-3)))
    with pytest.raises(FirstLossError):
        _check_first_loss(float("nan"), command([1], expected=(0.6931, 1e-3)))


def run_async(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), timeout=5))


def test_coordinator_commands_and_results_in_any_order_of_arrival():
    async def scenario():
        box = Coordinator()
        waiting = [asyncio.create_task(box.command(0)) for _ in range(2)]  # two ranks ask before the driver posts
        result = asyncio.create_task(box.result(0))
        await asyncio.sleep(0)
        assert not any(task.done() for task in [*waiting, result])
        assert await box.post("train") == 0 and await box.post("save") == 1
        assert await asyncio.gather(*waiting) == ["train", "train"] and await box.command(1) == "save"
        await box.answer(0, "report")
        assert await result == "report"

    run_async(scenario)


def test_coordinator_blocks_may_come_out_of_order_and_old_iterations_are_dropped():
    async def scenario():
        box = Coordinator()
        first = asyncio.create_task(box.block(0, 0))
        await box.put_block(0, 1, ["b"])
        assert not first.done() and await box.block(0, 1) == ["b"]
        await box.put_block(0, 0, ["a"])
        assert await first == ["a"]
        await box.put_block(1, 0, ["c"])
        assert box._blocks == {(1, 0): ["c"]}

    run_async(scenario)


def test_coordinator_failure_ends_every_wait_with_the_first_error():
    async def scenario():
        box = Coordinator()
        waiting = [asyncio.create_task(wait) for wait in (box.command(0), box.result(0), box.block(0, 0))]
        await asyncio.sleep(0)
        first = RuntimeError("first")
        await box.fail(first)
        await box.fail(RuntimeError("follow-up"))
        assert all(isinstance(answer, Failure) and answer.error is first for answer in await asyncio.gather(*waiting))
        assert (await box.command(3)).error is first

    run_async(scenario)


def test_coordinator_hands_metrics_out_once_in_order():
    async def scenario():
        box = Coordinator()
        for step in range(3):
            await box.log({"step": step})
        assert await box.drain() == [{"step": 0}, {"step": 1}, {"step": 2}] and await box.drain() == []

    run_async(scenario)
