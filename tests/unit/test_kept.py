"""What a learner's rank holds of an iteration's pairs: a few blocks and a batch, whatever the iteration's size; and the batches are the same."""

import dataclasses
import gc
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.learner import batches as batches_module
from spin_ray.learner.batches import READ_AHEAD, BlockFeed, batches
from spin_ray.learner.kept import Kept, once_all_are_there
from spin_ray.learner.messages import Train
from spin_ray.losses import PairObjective
from spin_ray.records import Pair, opponent_reference


def command(sizes, epochs):
    return Train(iteration=1, block_sizes=tuple(sizes), num_epochs=epochs, num_steps=0, objective=PairObjective(0.1), lr=1.0)


def all_in_memory(blocks, train, *, batch_pairs, seed):
    """What a rank that holds everything makes of an iteration's pairs."""
    pairs = [pair for block in blocks for pair in block]
    orders = [np.random.default_rng([seed, train.iteration, epoch]).permutation(len(pairs)) for epoch in range(1, train.num_epochs)]
    epochs = [pairs, *([pairs[i] for i in order] for order in orders)]
    return [epoch[start : start + batch_pairs] for epoch in epochs for start in range(0, len(epoch), batch_pairs)]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), epochs=st.integers(1, 3), batch=st.integers(1, 12), seed=st.integers(0, 3),
    first=st.integers(0, 12),
)
def test_property_batches_are_those_of_a_rank_that_holds_all_pairs(sizes, epochs, batch, seed, first):
    numbers = iter(range(sum(sizes)))
    blocks = [[next(numbers) for _ in range(size)] for size in sizes]
    wanted = all_in_memory(blocks, command(sizes, epochs), batch_pairs=batch, seed=seed)
    assert list(batches(blocks, command(sizes, epochs), [], batch_pairs=batch, seed=seed)) == wanted
    assert list(batches(blocks, command(sizes, epochs), [], batch_pairs=batch, seed=seed, first_step=first)) == wanted[first:]


def examples(pairs):
    return [(pair, np.stack([opponent_reference(pair)])) for pair in pairs]


def same(one, other):
    values = [[*(getattr(pair, field.name) for field in dataclasses.fields(Pair)), references] for pair, references in (one, other)]
    for a, b in zip(*values, strict=True):
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        else:
            assert a == b


def test_what_is_kept_comes_back_bit_by_bit(make_pairs):
    pairs = make_pairs(20)
    pairs[3] = dataclasses.replace(pairs[3], generated_ids=pairs[3].generated_ids[:0], opponent_real_logps=pairs[3].opponent_real_logps[:0])
    pairs[4] = dataclasses.replace(pairs[4], anchor_ids=np.arange(3, dtype=np.int32), opponent_anchor_logps=np.float32([-0.0, np.nan, -1e-40]))
    pairs[5] = dataclasses.replace(pairs[5], finish_reason="length", opponent_steps_early=7, scored_steps_early=2)
    made = examples(pairs)
    made[6] = made[6][0], np.concatenate([made[6][1], made[7][1]])  # theta_0's references too
    kept = Kept()
    kept.extend(made[:11])
    kept.extend(made[11:])
    assert len(kept) == 20
    for number in (19, 0, *range(20)):
        same(kept[number], made[number])


def test_all_blocks_are_there_before_the_first_is_handed_on(make_pairs):
    made, taken = examples(make_pairs(7)), []
    blocks = once_all_are_there(taken.append(len(block)) or block for block in (made[:3], made[3:4], made[4:]))
    assert taken == [3, 1, 3]  # before anybody asks: the weights change then
    found = list(blocks)
    assert [len(block) for block in found] == [3, 1, 3]
    for one, other in zip(itertools.chain(*found), made, strict=True):
        same(one, other)


def alive():
    return sum(type(each) is Pair for each in gc.get_objects())


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_rank_never_holds_more_pairs_than_a_few_batches(make_pairs, epochs):
    """3,000 pairs in blocks of 20, batches of 50: counted at every step."""
    before, counts = alive(), []
    blocks = (examples(make_pairs(20, seed=k)) for k in range(150))
    for step, batch in enumerate(batches(blocks, command([20] * 150, epochs), Kept(), batch_pairs=50, seed=0)):
        assert len(batch) == 50
        if step % 10 == 0:
            counts.append(alive() - before)
    assert step == 60 * epochs - 1 and max(counts) <= 3 * 50


class Mailbox:
    """The coordinator with a call that is answered at once; hands out so many blocks at a time."""

    def __init__(self, made, monkeypatch):
        self.made, self.offered, self.read = made, len(made), []
        self.blocks = SimpleNamespace(remote=self._blocks)
        monkeypatch.setattr(batches_module, "unwrapped", lambda value: value)
        monkeypatch.setattr(batches_module.ray, "get", lambda value: value)

    def _blocks(self, iteration, place):
        until = time.monotonic() + 20
        while self.offered <= place and time.monotonic() < until:
            time.sleep(0.01)
        return [Read(self, k) for k in range(place, self.offered)]


class Read:
    def __init__(self, mailbox, number):
        self._mailbox, self._number = mailbox, number

    def pairs(self):
        self._mailbox.read.append(self._number)
        return self._mailbox.made[self._number]


def settled(mailbox, number):
    until = time.monotonic() + 20
    while len(mailbox.read) < number and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    return len(mailbox.read)


def threads():
    return sum(thread.name == "block feed" for thread in threading.enumerate())


def test_the_feed_reads_a_few_blocks_ahead_and_ends_when_it_is_closed(monkeypatch):
    mailbox = Mailbox([[k] for k in range(100)], monkeypatch)
    before = threads()
    feed = BlockFeed(mailbox, 0, 100, lambda *span: None)
    coming = iter(feed)
    assert settled(mailbox, READ_AHEAD) == READ_AHEAD
    assert [next(coming) for _ in range(5)] == [[k] for k in range(5)]
    assert settled(mailbox, READ_AHEAD + 5) == READ_AHEAD + 5
    feed.close()
    settled(mailbox, 100)
    assert threads() == before and len(mailbox.read) == READ_AHEAD + 5


@pytest.mark.parametrize("wait_for_all", [False, True])
def test_the_feed_waits_for_all_blocks_only_where_it_is_told(monkeypatch, wait_for_all):
    mailbox = Mailbox([[k] for k in range(6)], monkeypatch)
    mailbox.offered = 3
    feed = BlockFeed(mailbox, 0, 6, lambda *span: None, wait_for_all=wait_for_all)
    assert settled(mailbox, 0 if wait_for_all else 3) == (0 if wait_for_all else 3)
    mailbox.offered = 6
    assert list(feed) == mailbox.made and mailbox.read == list(range(6))
    feed.close()


def test_an_error_of_a_block_is_raised_where_it_is_waited_for(monkeypatch):
    mailbox = Mailbox([[0], [1]], monkeypatch)
    monkeypatch.setattr(Read, "pairs", lambda self: 1 / (1 - self._number))
    feed = iter(BlockFeed(mailbox, 0, 2, lambda *span: None))
    assert next(feed) == 1.0
    with pytest.raises(ZeroDivisionError):
        next(feed)
