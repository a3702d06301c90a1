"""The learner's order of things: batches, learning rate, the coordinator's contract. No Ray, no model."""

import asyncio
import dataclasses
import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from spin_ray.config import Config, LearnerConfig, RunConfig, WeightsConfig
from spin_ray.errors import Diverged, RunStopped
from spin_ray.exchange.pairs import Given
from spin_ray.learner.batches import batches, learning_rate
from spin_ray.learner.coordinator import Base, Coordinator, Failure, Joined
from spin_ray.learner.loop import Grows, RolledBack, Worker, check_numbers, drivers_clock, staleness
from spin_ray.learner.messages import Count, StepRecord, Train, Wish
from spin_ray.losses import PairObjective
from spin_ray.records import Saved, Span, Version, opponent_reference
from spin_ray.storage import DISK

BASE = Base(Saved("theta_0"), None)


def command(sizes, *, epochs=2):
    return Train(iteration=1, block_sizes=tuple(sizes), num_epochs=epochs, num_steps=0, objective=PairObjective(0.1), lr=1.0)


def blocks(sizes):
    numbers = iter(range(sum(sizes)))
    return [[next(numbers) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("sizes", [[4, 4, 3], [1], [10], [2, 9]])
def test_every_pair_once_per_epoch_last_batch_smaller(sizes):
    train, total = command(sizes, epochs=3), sum(sizes)
    found = list(batches(blocks(sizes), train, [], batch_pairs=4, seed=0))
    assert len(found) == Config(learner=LearnerConfig(batch_pairs=4)).num_steps(total, 3) == 3 * -(-total // 4)
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

    found = batches(slow(), command([4, 4]), [], batch_pairs=4, seed=0)
    assert next(found) == [0, 1, 2, 3] and len(seen) == 1


def test_later_epochs_are_shuffled_by_seed():
    def run(seed):
        return list(batches(blocks([8]), command([8]), [], batch_pairs=8, seed=seed))

    assert run(0) == run(0) and run(0)[1] != run(1)[1] and run(0)[0] == list(range(8)) != run(0)[1]


def test_missing_pairs_are_an_error():
    with pytest.raises(RuntimeError, match="3 pairs, expected 4"):
        list(batches([[0, 1, 2]], command([4]), [], batch_pairs=2, seed=0))


def test_max_steps():
    assert Config(learner=LearnerConfig(batch_pairs=4), run=RunConfig(max_steps=3)).num_steps(100, 2) == 3


def test_learning_rate_rises_then_falls_to_almost_zero():
    rates = [learning_rate(step, 20, peak=1.0, warmup_fraction=0.1) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(1 / 18)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[1:])) and min(rates) > 0
    assert learning_rate(0, 1, peak=1.0, warmup_fraction=0.1) == 1.0


class FakePlayer:
    """Scores a pair by its prompt_id, 1000 higher with theta_t's copy, 2000 with theta_0's; remembers the order of calls."""

    def __init__(self):
        self.calls = []

    def keep_copy(self, name, saved=None):
        self.calls.append(f"keep {name}" + (f" of {saved.model}" if saved else ""))

    def score(self, pairs, *, copy=None):
        self.calls.append("score")
        return np.stack([np.full((3, 2), pair.prompt_id + {None: 0, "opponent": 1000, "base": 2000}[copy]) for pair in pairs])


def scored(scorer, pairs, **more):
    """References that the worker gives two blocks, and in which order it scored and yielded."""
    player = FakePlayer()
    worker = Worker(player, SimpleNamespace(coordinator=None, storage=DISK), Joined(BASE, 1, 0))
    references = []
    for block in worker._scored(iter([pairs[:2], pairs[2:]]), dataclasses.replace(command([2, 2]), scorer=scorer, **more)):
        player.calls.append("yield")
        references += [reference for _, reference in block]
    return np.array(references), player.calls


def test_references_of_each_scorer(make_pairs):
    pairs = make_pairs(4)
    own, calls = scored("opponent", pairs)
    assert calls == ["yield", "yield"]
    assert own.shape == (4, 1, 3, 2)
    np.testing.assert_allclose(own[:, 0, :2].sum(-1), [[p.opponent_real_logps.sum(), p.opponent_generated_logps.sum()] for p in pairs], rtol=1e-6)
    frozen, calls = scored("frozen", pairs)
    assert calls == ["keep opponent", "score", "yield", "score", "yield"] and frozen[:, 0, 0, 0].tolist() == [1000, 1001, 1002, 1003]
    learner, calls = scored("learner", pairs)
    assert calls == ["score", "score", "yield", "yield"] and learner[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_theta_0_s_references_come_second(make_pairs):
    pairs = make_pairs(4)
    for scorer, first in (("opponent", None), ("frozen", [1000, 1001, 1002, 1003]), ("learner", [0, 1, 2, 3])):
        found, calls = scored(scorer, pairs, base=Saved("sft"))
        assert "keep base of sft" in calls and found.shape == (4, 2, 3, 2)
        assert found[:, 1, 2, 1].tolist() == [2000, 2001, 2002, 2003] and (first is None or found[:, 0, 0, 0].tolist() == first)


def test_a_reference_is_split_where_the_shorter_answer_ends(make_pairs):
    pair = dataclasses.replace(
        make_pairs(1)[0], real_ids=np.arange(3), generated_ids=np.arange(5), anchor_ids=np.arange(2), opponent_real_logps=np.float32([-1, -2, -3]),
        opponent_generated_logps=np.float32([-1, -2, -3, -4, -5]), opponent_anchor_logps=np.float32([-7, -8]),
    )
    assert opponent_reference(pair).tolist() == [[-6, 0], [-6, -9], [-15, 0]]
    alone = dataclasses.replace(pair, generated_ids=pair.generated_ids[:0], opponent_generated_logps=pair.opponent_generated_logps[:0])
    assert opponent_reference(alone)[0].tolist() == [-6, 0]


def test_staleness(make_pairs):
    pairs = make_pairs(4)
    assert staleness(pairs) == {"stale_share": 0.0, "max_staleness_steps": 0.0}
    pairs[1] = dataclasses.replace(pairs[1], opponent_steps_early=7, scored_steps_early=7)
    pairs[2] = dataclasses.replace(pairs[2], iteration=1, opponent_steps_early=7)  # replayed: the iteration before's
    assert staleness(pairs) == {"stale_share": 0.25, "max_staleness_steps": 7.0}
    assert opponent_reference(pairs[0]).dtype == np.float64


def run_async(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), timeout=60))


def test_coordinator_commands_and_results_in_any_order_of_arrival():
    async def scenario():
        box = Coordinator(BASE)
        waiting = [asyncio.create_task(box.command(0)) for _ in range(2)]  # two ranks ask before the driver posts
        result = asyncio.create_task(box.result(0))
        await asyncio.sleep(0)
        assert not any(task.done() for task in [*waiting, result])
        assert await box.post("train") == 0 and await box.post("save") == 1
        assert await asyncio.gather(*waiting) == ["train", "train"] and await box.command(1) == "save"
        await box.answer(0, "report")
        assert await result == "report"
        await box.answer(Version(1, 2), "snapshot")  # announced under a key of its own
        assert await box.result(Version(1, 2)) == "snapshot"

    run_async(scenario)


def test_coordinator_blocks_may_come_out_of_order_and_old_iterations_are_dropped():
    async def scenario():
        box = Coordinator(BASE)
        first = asyncio.create_task(box.blocks(0, 0))
        await box.put_block(0, 1, ["b"])
        await box.put_block(0, 3, ["d"])
        assert not first.done() and await box.blocks(0, 1) == ["b"]
        await box.put_block(0, 0, ["a"])
        assert await first == ["a", "b"]  # up to the first gap
        await box.put_block(1, 0, ["c"])  # the next iteration's may come early
        assert await box.blocks(0, 3) == ["d"]
        assert not await box.move_base(Base(Saved("theta_1"), None, 4, iteration=1), group=7) and len(box._blocks) == 4
        assert await box.move_base(Base(Saved("theta_1"), None, 4, iteration=1), group=0)
        assert box._blocks == {(1, 0): ["c"]}

    run_async(scenario)


def test_coordinator_failure_ends_every_wait_with_the_first_error():
    async def scenario():
        box = Coordinator(BASE)
        waiting = [asyncio.create_task(wait) for wait in (box.command(0), box.result(0), box.blocks(0, 0))]
        await asyncio.sleep(0)
        first = RuntimeError("first")
        await box.fail(Failure(first))
        await box.fail(Failure(RuntimeError("follow-up")))
        assert all(isinstance(answer, Failure) and answer.error is first for answer in await asyncio.gather(*waiting))
        assert (await box.command(3)).error is first

    run_async(scenario)


def test_coordinator_hands_metrics_out_once_in_order():
    async def scenario():
        box = Coordinator(BASE)
        for step in range(3):
            await box.log({"step": step})
        assert await box.drain() == [{"step": 0}, {"step": 1}, {"step": 2}] and await box.drain() == []

    run_async(scenario)


def test_a_new_group_joins_at_the_base_and_the_base_moves_only_with_the_group_that_made_it():
    async def scenario():
        box = Coordinator(BASE)
        assert await box.join() == Joined(BASE, 1, 0) and await box.group() == 1
        assert (await box.join()).base == BASE  # a worker died
        await box.answer(0, "of the second group")
        later = Base(Saved("theta_1"), None, first_command=4)
        assert not await box.move_base(later, group=1) and (await box.join()).base == BASE
        assert box._results == {}  # the third group answers again
        assert await box.move_base(later, group=3) and (await box.join()).base == later

    run_async(scenario)


def test_no_group_joins_while_what_the_one_before_wrote_is_put_in_its_place():
    async def scenario():
        box = Coordinator(BASE)
        await box.join()
        assert not await box.hold(0) and await box.hold(1)
        later = asyncio.create_task(box.join())
        await asyncio.sleep(0)
        assert await box.group() == 1 and not later.done()
        await box.let_go()
        assert (await later).group == 2 and not await box.hold(1)
        await box.hold(2)
        await box.fail(Failure(RuntimeError("over")))
        assert isinstance(await box.join(), Failure)  # nobody waits for a run that has ended

    run_async(scenario)


def test_what_lies_before_the_base_is_dropped():
    """Published weights among it: a reference that stays here would keep a whole model in the object store."""

    async def scenario():
        box = Coordinator(BASE)
        for t in range(20):
            train, publish = [await box.post(f"{what} {t}") for what in ("train", "publish")]
            await box.join()
            early = Version(t + 2, 1) if t % 2 else Version(t + 1, 1)  # a quick learner may be in t + 1 before the base moves
            for key in (train, publish, early):
                await box.answer(key, f"weights of {key}")
            ahead = await box.post(f"train {t + 1}")
            await box.answer(ahead, "report")
            assert await box.move_base(Base(Saved(f"theta_{t + 1}"), None, first_command=ahead, iteration=t + 1), await box.group())
            assert box._commands == {ahead: f"train {t + 1}"} and box._results.keys() == {ahead, *([early] if t % 2 else [])}
            assert await box.command(ahead) == f"train {t + 1}" and await box.result(ahead) == "report"

    run_async(scenario)


def test_a_rolled_back_group_ends_and_is_no_death():
    async def scenario():
        box = Coordinator(BASE, max_restarts=1, rollbacks=3)
        assert (await box.join()).rollbacks == 3
        ranks = [asyncio.create_task(box.rolled_back(1)) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(rank.done() for rank in ranks)
        assert await box.roll_back(1)
        assert await asyncio.gather(*ranks) == [None, None]
        await box.group_ended("rank 0: RolledBack")
        assert await box.join() == Joined(BASE, 2, 4)
        await box.group_ended("rank 1: killed")  # the one death that is put up with
        assert await box.join() == Joined(BASE, 3, 4)
        assert not await box.roll_back(2)  # news from a group that is gone
        await box.group_ended("rank 0: out of memory")
        failure = await box.join()
        assert str(failure.error) == "workers of the main player failed more often than learner.max_restarts=1 allows; first rank 1: killed"
        assert isinstance(failure.error, RunStopped)

    run_async(scenario)


def test_a_group_makes_way_for_a_larger_one_only_where_its_progress_counts_and_that_is_no_death():
    async def scenario():
        box = Coordinator(BASE)
        await box.join()
        step = StepRecord(0, 3, 10, {})
        assert await box.log(step) == Wish()
        await box.make_room()
        assert await box.log(step) == await box.log("a span") == Wish(grow_in=0)
        assert await box.log(StepRecord(1, 0, 10, {})) == Wish()  # theta_1 is not the base yet: its training would be lost
        assert await box.move_base(Base(Saved("theta_1"), None, 4, iteration=1), group=1)
        assert await box.log(StepRecord(1, 1, 10, {})) == Wish(grow_in=1)
        await box.growing(0)  # news from a group that is gone
        await box.growing(1)
        await box.group_ended("rank 0: Grows")
        await box.join()
        assert await box.log(StepRecord(1, 2, 10, {})) == Wish() and box._failure is None
        await box.group_ended("rank 0: killed")
        assert isinstance(await box.failure(), Failure)  # no restart is allowed here

    run_async(scenario)


def test_no_record_is_sent_before_the_last_one_has_arrived(monkeypatch):
    """Ray may carry out two calls of one caller to an async actor in either order: the driver heard of step 2 before step 1."""
    seen = []

    def arrives(references):
        seen.extend(f"{reference} arrived" for reference in references)
        return [Wish() for _ in references]

    monkeypatch.setattr("spin_ray.learner.loop.ray.get", arrives)
    log = SimpleNamespace(remote=lambda record: seen.append(f"{record} sent") or record)
    worker = Worker(SimpleNamespace(rank=0), SimpleNamespace(coordinator=SimpleNamespace(log=log)), Joined(BASE, 1, 0))
    for record in "abc":
        worker._log(record)
    assert seen == ["a sent", "a arrived", "b sent", "b arrived", "c sent"]


class RecordingPlayer:
    """The verbs that training needs; its numbers go bad at a learning rate of 1."""

    rank, world_size = 0, 1

    def __init__(self):
        self.calls, self.lrs = [], []

    def wait_for_all_ranks(self):
        pass

    def begin_iteration(self):
        self.calls.append("begin")

    def load_checkpoint(self, folder, *, name):
        self.calls.append(folder.name)

    def any_rank(self, *flags):
        return flags

    def step(self, pairs, references, *, objective, lr):
        self.lrs.append(lr)
        return {"loss": float("nan") if lr >= 1 else 0.5, "grad_norm": 1.0, "num_tokens": 3.0}


class Mailbox:
    """The coordinator as a worker sees it, in this process: all blocks are there, every divergence is rolled back."""

    def __init__(self, blocks, wishes):
        self.records = []
        self.log = self._method(lambda record: self.records.append(record) or wishes.get(len(self.records), Wish()))
        self.growing = self._method(lambda group: self.records.append(f"group {group} grows"))
        self.blocks = self._method(lambda iteration, start: blocks[start:])
        self.rolled_back = self._method(lambda group: None)

    def _method(self, function):
        return SimpleNamespace(remote=function)


@pytest.fixture
def trained(monkeypatch, make_pairs, tmp_path):
    """trained(rollbacks, progress) -> player, records: the training of one iteration, as the group after so many rollbacks does it."""
    monkeypatch.setattr("ray.get", lambda value: value)

    def train(rollbacks, progress, wishes=None, **more):
        given = [Given(tuple(make_pairs(4, seed=block))) for block in range(5)]
        (tmp_path / "progress").mkdir(exist_ok=True)
        (tmp_path / "progress/count.json").write_text(json.dumps(dataclasses.asdict(progress)))
        mailbox, player = Mailbox(given, wishes or {}), RecordingPlayer()
        config = LearnerConfig(batch_pairs=4, warmup_fraction=0.5)
        args = SimpleNamespace(
            coordinator=mailbox, config=config, seed=0, log_dir="logs", storage=DISK, rollback_lr_factor=0.5, weights=WeightsConfig(),
            hardware=SimpleNamespace(device="cpu", sampler_env={}),
        )
        command = dataclasses.replace(command_of_five, progress_path=str(tmp_path / "progress"), **more)
        try:
            player.report = Worker(player, args, Joined(BASE, 7, rollbacks)).carry_out(command)
        except RolledBack:
            player.calls.append("rolled back")
        except Grows:
            player.calls.append("ended")
        return player, [record for record in mailbox.records if not isinstance(record, Span)]

    command_of_five = dataclasses.replace(command([4] * 5, epochs=1), num_steps=5, lr=2.0)
    return train


def test_a_divergence_ends_the_group_and_the_next_one_trains_with_a_lower_lr_from_the_start(trained):
    player, records = trained(0, Count(steps=1))
    assert player.calls == ["begin", "step_1", "rolled back"] and player.lrs == [2.0]
    divergence = records[-1]
    assert (divergence.group, divergence.iteration, divergence.step) == (7, 1, 1) and "step 1: loss is nan (lr 2" in str(divergence.error)
    player, records = trained(2, Count(steps=1))  # what the first group saved is on the way to the bad numbers
    assert player.calls == ["begin"] and player.lrs == pytest.approx([0.25, 0.5, 0.5, 0.5 * 2 / 3, 0.5 / 3])
    assert [record.step for record in records] == [0, 1, 2, 3, 4]
    player, _ = trained(2, Count(steps=3, rollbacks=2))
    assert player.calls == ["begin", "step_3"] and len(player.lrs) == 2


@pytest.mark.parametrize(("grow_in", "then"), [(1, ["begin", "step_1", "save", "ended"]), (0, ["begin", "step_1"])])
def test_a_group_saves_its_progress_and_ends_for_a_larger_one(trained, monkeypatch, grow_in, then):
    monkeypatch.setattr(Worker, "_save_progress", lambda worker, command, count: worker._player.calls.append("save") or worker._log(f"saved {count.steps}"))
    player, records = trained(0, Count(steps=1), {1: Wish(grow_in=grow_in)}, lr=0.5)
    assert player.calls == then
    if "ended" in then:
        assert [record if isinstance(record, str) else record.step for record in records] == [1, 2, "saved 3", "group 7 grows"]


def test_a_try_ends_where_its_numbers_go_bad_and_the_group_goes_on(trained):
    player, records = trained(0, Count(steps=1), is_a_try=True)
    assert player.calls == ["begin", "step_1"] and player.lrs == [2.0]
    assert player.report.num_steps == 1
    assert not records


def test_progress_of_an_iteration_that_is_not_the_base_s_belongs_to_a_theta_that_is_lost(trained, tmp_path, monkeypatch):
    """A group that got as far as iteration 1 before theta_1 was durable may have saved some; neither this group nor a later one believes it."""
    first = Worker.carry_out

    def at_base_first(worker, command):
        first(worker, dataclasses.replace(command, iteration=0, progress_path=None))
        worker._player.calls.clear()
        return first(worker, command)

    monkeypatch.setattr(Worker, "carry_out", at_base_first)
    player, records = trained(2, Count(steps=3, rollbacks=2))
    assert player.calls == ["begin"] and [record.step for record in records if record.iteration == 1] == [0, 1, 2, 3, 4]
    assert not (tmp_path / "progress").exists()


def test_count_goes_on_where_it_was():
    count = Count().after({"loss": 2.0, "pair_loss": 0.7, "expected_pair_loss": 0.69, "num_tokens": 10.0}, 4).after({"loss": 1.0, "num_tokens": 5.0}, 3)
    assert count == Count(steps=2, pairs=7, tokens=15, first_loss=0.7, expected_first_loss=0.69)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_a_number_stops_the_run(name):
    check_numbers({"loss": 0.5, "grad_norm": 1.0}, 1, 7, 1e-3, "logs")
    with pytest.raises(Diverged, match=rf"iteration 1, step 7: {name} is nan .*smaller spin\.lr"):
        check_numbers({"loss": 0.5, "grad_norm": 1.0, name: float("nan")}, 1, 7, 1e-3, "logs")


def test_spans_are_by_the_clock_of_the_driver_s_host(monkeypatch):
    monkeypatch.setattr("spin_ray.learner.loop.ray.get", lambda value: value)
    monkeypatch.setattr("spin_ray.learner.loop.time", SimpleNamespace(monotonic=lambda: 7.0, time=lambda: 0.0))
    now = drivers_clock(SimpleNamespace(now=SimpleNamespace(remote=lambda: 1000.0)))
    worker, logged = Worker(SimpleNamespace(rank=0), SimpleNamespace(coordinator=None), Joined(BASE, 1, 0), now), []
    monkeypatch.setattr(worker, "_log", logged.append)
    with worker._span("save"):
        monkeypatch.setattr("spin_ray.learner.loop.time.monotonic", lambda: 9.0)
    assert logged == [Span("main player", "save", 0, 1000.0, 1002.0)]
