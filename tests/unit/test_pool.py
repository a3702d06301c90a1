"""The sampler pool's ordering contract, with fake samplers in this process: no Ray, no engine, and no time but the test's own."""

import asyncio
import gc
import selectors
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import ray

from spin_ray.config import WeightsConfig
from spin_ray.errors import EngineFailed, TransferFailed, WeightsLate, WeightsLost, WrongVersion
from spin_ray.records import PublishedWeights, SamplingSettings, Version
from spin_ray.sampler.actor import Sampler
from spin_ray.sampler.fake import FakeSampler
from spin_ray.sampler.pool import AUDIT, CHUNK, EVALUATE, PLAY, Limits, SamplerPool
from spin_ray.transport.object_store import Transport

SETTINGS = SamplingSettings(0.0, 1.0, 8, ())
THETA_0, THETA_1 = Version(0), Version(1)


class Handle:
    """What `actor.method.remote(...)` is, for an object in this process."""

    def __init__(self, target, log=None):
        self._target, self._log = target, log
        self._calls = []

    def __getattr__(self, name):
        class Method:
            @staticmethod
            def remote(*args):
                if self._log is not None and name in ("sample", "score", "load"):
                    self._log.append(name)
                self._calls.append(asyncio.ensure_future(getattr(self._target, name)(*args)))
                return asyncio.ensure_future(answer_or_death(self._calls[-1]))

        return Method


async def answer_or_death(call):
    await asyncio.wait([call])
    if call.cancelled():
        raise ray.exceptions.RayActorError
    return call.result()


def prompts(count):
    return [np.array([number, 7], np.int32) for number in range(count)]


def weights(version):
    return PublishedWeights(version, (), 0)


class OwnClock(asyncio.SelectorEventLoop):
    """Time passes only where everybody waits for it, and then at once: a busy machine is no slower than any other."""

    def __init__(self):
        super().__init__(Skipping(self))
        self.now = 1000.0

    def time(self):
        return self.now


class Skipping(selectors.SelectSelector):
    """Instead of waiting it sets the clock forward."""

    def __init__(self, loop):
        super().__init__()
        self._loop = loop

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for somebody else"
            self._loop.now += max(timeout, 0)
        return ready


def run(scenario):
    loop = OwnClock()
    clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
    try:
        with (asyncio.Runner(loop_factory=lambda: loop) as runner,
              mock.patch("spin_ray.sampler.pool.time", clock), mock.patch("spin_ray.sampler.fake.time", clock)):
            return runner.run(asyncio.wait_for(scenario(), timeout=1000))
    finally:
        gc.collect()  # futures whose error nobody asked for say so when they are collected: here, not in the middle of another test


def restart(handle):
    """What Ray does to an actor: its calls fail; a new one in its place, with the version that it was made with."""
    for call in handle._calls:
        call.cancel()
    handle._target, handle._calls = FakeSampler(THETA_0), []


async def started(*samplers, room=64, log=None, release=True, **limits):
    pool = SamplerPool([Handle(sampler, log) for sampler in samplers], THETA_0, Limits(room, **limits), restart)
    await pool.start()
    await pool.ready()
    if release:
        await pool.release(THETA_0)
    return pool


def ids(completions):
    return [completion.token_ids.tolist() for completion in completions]


def test_answers_come_in_the_prompts_order_whatever_the_number_of_replicas():
    async def answers(*samplers):
        return ids(await (await started(*samplers)).sample(THETA_0, prompts(100), SETTINGS))

    one = run(lambda: answers(FakeSampler(THETA_0)))
    assert len({tuple(answer) for answer in one}) == 100
    assert one == run(lambda: answers(FakeSampler(THETA_0, prompts_per_s=2000), FakeSampler(THETA_0), FakeSampler(THETA_0, prompts_per_s=700)))


def test_a_slow_replica_gets_less():
    async def scenario():
        slow, fast = FakeSampler(THETA_0, prompts_per_s=200), FakeSampler(THETA_0, prompts_per_s=2000)
        pool = await started(slow, fast, room=CHUNK)
        await pool.sample(THETA_0, prompts(40 * CHUNK), SETTINGS)
        assert slow.num_prompts + fast.num_prompts == 40 * CHUNK and fast.num_prompts > 3 * slow.num_prompts

    run(scenario)


def test_replicas_share_what_is_to_be_written_whatever_they_score():
    """Beside an answer that a replica writes, one that it only scores is no load."""
    async def scenario():
        samplers = [FakeSampler(THETA_0, prompts_per_s=1000, scores_per_s=1000) for _ in range(2)]
        pool = await started(*samplers)
        requests = [pool.score(THETA_0, prompts(CHUNK), prompts(CHUNK))] + [pool.sample(THETA_0, prompts(4), SETTINGS) for _ in range(4)]
        await asyncio.gather(*requests)
        assert sorted(sampler.num_prompts for sampler in samplers) == [8, 8 + CHUNK]

    run(scenario)


def test_requests_of_a_later_version_wait_until_it_is_loaded_and_released():
    async def scenario():
        pool = await started(FakeSampler(THETA_0))
        early = asyncio.create_task(pool.sample(THETA_1, prompts(3), SETTINGS))
        gate = asyncio.create_task(pool.released(THETA_1))
        await pool.sample(THETA_0, prompts(3), SETTINGS)
        await pool.load(weights(THETA_1))
        assert len(await pool.score(THETA_1, prompts(2), prompts(2), AUDIT)) == 2  # the audit comes before the release
        await asyncio.sleep(0.01)
        assert not early.done() and not gate.done()
        await pool.release(THETA_1)
        assert {completion.version for completion in await early} == {THETA_1}
        await gate

    run(scenario)


def test_an_earlier_version_is_refused():
    async def scenario():
        pool = await started(FakeSampler(THETA_0))
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        with pytest.raises(WrongVersion, match="asked for theta_0, the samplers are at theta_1"):
            await pool.sample(THETA_0, prompts(1), SETTINGS)

    run(scenario)


def test_load_waits_for_what_the_present_version_owes():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, prompts_per_s=400), room=CHUNK)
        owed = asyncio.create_task(pool.sample(THETA_0, prompts(4 * CHUNK), SETTINGS))
        await asyncio.sleep(0)
        load = asyncio.create_task(pool.load(weights(THETA_1)))
        assert {completion.version for completion in await owed} == {THETA_0}
        await load

    run(scenario)


def test_play_goes_before_evaluation():
    async def scenario():
        log = []
        pool = await started(FakeSampler(THETA_0, prompts_per_s=2000), room=CHUNK, log=log, release=False)
        evaluation = asyncio.create_task(pool.sample(THETA_0, prompts(4 * CHUNK), SETTINGS, EVALUATE))
        await asyncio.sleep(0)
        play = asyncio.create_task(pool.score(THETA_0, prompts(4 * CHUNK), prompts(4 * CHUNK)))
        await asyncio.sleep(0)
        await pool.release(THETA_0)
        await asyncio.gather(evaluation, play)
        assert log == ["score"] * 4 + ["sample"] * 4

    run(scenario)


def test_evaluation_holds_up_no_load_and_goes_on_when_its_version_comes_back():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, prompts_per_s=4000), room=CHUNK)
        evaluation = asyncio.create_task(pool.sample(THETA_0, prompts(8 * CHUNK), SETTINGS, EVALUATE))
        await asyncio.sleep(0)
        await pool.load(weights(THETA_1))
        answered = sum(span.activity == "evaluate" for span in await pool.spans())
        assert 0 < answered <= 2 and not evaluation.done()  # what the replica had begun
        await pool.release(THETA_1)
        await pool.sample(THETA_1, prompts(CHUNK), SETTINGS)
        assert not evaluation.done()
        await pool.load_again(weights(THETA_0), THETA_1)
        assert ids(await evaluation) == ids([FakeSampler(THETA_0)._completion(prompt, SETTINGS) for prompt in prompts(8 * CHUNK)])
        assert {completion.version for completion in await evaluation} == {THETA_0}
        await pool.load_again(weights(THETA_1), THETA_1)
        assert len(await pool.sample(THETA_1, prompts(1), SETTINGS, EVALUATE)) == 1
        assert len(await pool.spans()) == 8 - answered + 4  # nothing was answered twice

    run(scenario)


def test_likelihoods_are_put_off_and_come_back_like_every_evaluation():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, scores_per_s=4000), room=CHUNK)
        fake, questions = FakeSampler(THETA_0), prompts(8 * CHUNK)
        drawn = [fake._completion(question, SETTINGS).token_ids for question in questions]
        asked = asyncio.create_task(pool.likelihood(THETA_0, questions, [*drawn[:-1], drawn[-1] + 1]))
        await asyncio.sleep(0)
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        assert not asked.done()
        with pytest.raises(WrongVersion):
            await pool.likelihood(THETA_0, questions[:1], drawn[:1], PLAY)
        await pool.load_again(weights(THETA_0), THETA_1)
        assert [each.greedy for each in await asked] == [True] * (8 * CHUNK - 1) + [False]
        assert {each.logp for each in await asked} == {-8.0}

    run(scenario)


def test_old_weights_do_not_come_back_over_newer_ones():
    async def scenario():
        log = []
        pool = await started(FakeSampler(THETA_0, load_s=0.05), log=log)
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        late = asyncio.create_task(pool.load(weights(Version(2))))
        await asyncio.sleep(0)
        await pool.load_again(weights(THETA_0), THETA_1)
        await late
        assert log == ["load", "load"]
        await pool.release(Version(2))
        assert (await pool.sample(Version(2), prompts(1), SETTINGS))[0].version == Version(2)

    run(scenario)


def test_the_block_that_is_trained_on_first_is_answered_first():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, prompts_per_s=2000), room=CHUNK, release=False)
        done = []

        async def play(order):
            await pool.sample(THETA_0, prompts(2 * CHUNK), SETTINGS, PLAY, order)
            done.append(order)

        blocks = [asyncio.create_task(play(order)) for order in (3, 1, 2, 0)]
        await asyncio.sleep(0)
        await pool.release(THETA_0)
        await asyncio.gather(*blocks)
        assert done == [0, 1, 2, 3]

    run(scenario)


def test_a_replica_that_joins_late_gets_the_present_weights_and_works():
    async def scenario():
        late = FakeSampler(THETA_0, start_s=0.1)
        pool = await started(FakeSampler(THETA_0, prompts_per_s=400), late, room=CHUNK)
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        answers = await pool.sample(THETA_1, prompts(20 * CHUNK), SETTINGS)
        assert late.num_prompts > 0 and {completion.version for completion in answers} == {THETA_1}

    run(scenario)


def test_a_broken_engine_is_started_anew_and_nothing_it_owed_is_lost():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, fail_after=2 * CHUNK), FakeSampler(THETA_0), room=CHUNK, max_restarts=1)
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        answers = await pool.sample(THETA_1, prompts(20 * CHUNK), SETTINGS)
        whole = await (await started(FakeSampler(THETA_0))).sample(THETA_0, prompts(20 * CHUNK), SETTINGS)
        assert ids(answers) == ids(whole) and {completion.version for completion in answers} == {THETA_1}
        assert await pool.num_restarts() == 1

    run(scenario)


def test_a_hanging_engine_is_started_anew():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, prompts_per_s=0.01), request_timeout_s=0.05, max_restarts=1)
        assert len(await pool.sample(THETA_0, prompts(3), SETTINGS)) == 3 and await pool.num_restarts() == 1

    run(scenario)


@pytest.mark.parametrize("mute", [False, True], ids=["engine", "process"])
def test_a_heartbeat_finds_what_hangs_long_before_its_deadline(mute):
    async def scenario():
        hangs = FakeSampler(THETA_0, hang_after=2 * CHUNK, mute=mute)
        pool = await started(hangs, FakeSampler(THETA_0), room=CHUNK, heartbeat_timeout_s=0.1, request_timeout_s=100, max_restarts=1)
        answers = await pool.sample(THETA_0, prompts(20 * CHUNK), SETTINGS)
        whole = await (await started(FakeSampler(THETA_0))).sample(THETA_0, prompts(20 * CHUNK), SETTINGS)
        assert ids(answers) == ids(whole) and await pool.num_restarts() == 1

    run(scenario)


def test_a_process_that_hangs_in_a_load_is_found_by_its_silence():
    async def scenario():
        class HangsInLoad(FakeSampler):
            async def load(self, weights):
                self.num_prompts = 1
                return await super().load(weights)

        pool = await started(HangsInLoad(THETA_0, hang_after=0, mute=True), heartbeat_timeout_s=0.1, request_timeout_s=100, max_restarts=1)
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        assert len(await pool.sample(THETA_1, prompts(3), SETTINGS)) == 3 and await pool.num_restarts() == 1

    run(scenario)


def test_a_replica_that_died_while_it_owed_nothing_is_found_by_the_next_request():
    """Ray hands that to the new process, which has no engine and not the present weights."""

    async def scenario():
        handle = Handle(FakeSampler(THETA_0))
        pool = SamplerPool([handle], THETA_0, Limits(64, max_restarts=1), restart)
        await pool.start()
        await pool.ready()
        await pool.release(THETA_0)
        handle._target = object.__new__(Sampler)
        handle._target._started = None
        assert len(await pool.sample(THETA_0, prompts(3), SETTINGS)) == 3
        assert await pool.num_restarts() == 1 and isinstance(handle._target, FakeSampler)

    run(scenario)


def test_a_slow_step_an_idle_engine_and_a_long_load_are_no_hang():
    async def scenario():
        class Slow(FakeSampler):
            loading = False

            async def load(self, weights):
                self.loading = True
                await super().load(weights)
                self.loading = False

            async def stuck_s(self):
                return 99.0 if self.loading else 0.0

        slow = Slow(THETA_0, prompts_per_s=100, load_s=0.3)  # a chunk takes 0.16 s, in many steps
        pool = await started(slow, room=CHUNK, heartbeat_timeout_s=0.1, max_restarts=0)
        await pool.sample(THETA_0, prompts(CHUNK), SETTINGS)
        await asyncio.sleep(0.2)
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        assert len(await pool.sample(THETA_1, prompts(3), SETTINGS)) == 3 and await pool.num_restarts() == 0

    run(scenario)


def test_the_last_hang_reaches_who_waits_for_it_at_once():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, hang_after=0), heartbeat_timeout_s=0.05, request_timeout_s=100, max_restarts=0)
        with pytest.raises(EngineFailed, match=r"sampler 0: hung: its engine was at one step .*heartbeat_timeout_s=0.05; see logs/sampler-0"):
            await pool.sample(THETA_0, prompts(3), SETTINGS)

    run(scenario)


def test_one_restart_too_many_stops_with_the_first_error():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, fail_after=5), FakeSampler(THETA_0, fail_after=6), room=CHUNK, max_restarts=0)
        with pytest.raises(EngineFailed, match="engine failed after 5 prompts"):
            await pool.sample(THETA_0, prompts(8 * CHUNK), SETTINGS)
        with pytest.raises(EngineFailed, match="engine failed after 5 prompts"):
            await pool.score(THETA_0, prompts(1), prompts(1))

    run(scenario)


def test_a_request_s_own_fault_reaches_who_asked_and_restarts_nothing():
    async def scenario():
        class Strict(FakeSampler):
            async def sample(self, *_):
                raise ValueError("100 tokens leave no room")

        pool = await started(Strict(THETA_0), max_restarts=1)
        with pytest.raises(ValueError, match="leave no room"):
            await pool.sample(THETA_0, prompts(1), SETTINGS)
        assert await pool.num_restarts() == 0

    run(scenario)


def test_a_replica_that_never_comes_up_ends_every_wait():
    async def scenario():
        class Broken(FakeSampler):
            async def ready(self):
                raise RuntimeError("no GPU")

        pool = SamplerPool([Handle(Broken(THETA_0))], THETA_0, Limits(8))
        asked = asyncio.create_task(pool.sample(THETA_0, prompts(1), SETTINGS))
        await pool.start()
        for wait in (pool.ready(), asked):
            with pytest.raises(RuntimeError, match="no GPU"):
                await wait

    run(scenario)


def test_spans_say_who_did_what():
    async def scenario():
        pool = await started(FakeSampler(THETA_0), FakeSampler(THETA_0))
        await pool.sample(THETA_0, prompts(2 * CHUNK), SETTINGS)
        await pool.load(weights(THETA_1))
        spans = await pool.spans()
        assert {(span.player, span.activity, span.iteration) for span in spans} == {
            (f"opponent {replica}", activity, version) for replica in (0, 1) for activity, version in (("play", 0), ("load", 1))
        }
        assert all(span.begin <= span.end for span in spans) and await pool.spans() == []

    run(scenario)


class Loses(FakeSampler):
    """Finds the weights lost that carry no bytes."""

    async def load(self, weights):
        if not weights.num_bytes:
            raise WeightsLost("gone")
        return await super().load(weights)


def test_lost_weights_are_said_to_be_lost_and_can_be_loaded_again():
    async def scenario():
        pool = await started(Loses(THETA_0), FakeSampler(THETA_0, load_s=0.05))
        with pytest.raises(WeightsLost):
            await pool.load(weights(THETA_1))
        await pool.load(PublishedWeights(THETA_1, (), 8))
        await pool.release(THETA_1)
        answers = await pool.sample(THETA_1, prompts(8 * CHUNK), SETTINGS)
        assert {completion.version for completion in answers} == {THETA_1} and await pool.num_restarts() == 0

    run(scenario)


@pytest.mark.parametrize("how", ["load", "saved"])
def test_a_replica_that_joins_when_the_weights_are_lost_waits_for_them(how):
    async def scenario():
        late = Loses(THETA_0, start_s=0.05)
        pool = await started(FakeSampler(THETA_0), late, room=CHUNK)
        await pool.load(weights(THETA_1))
        await asyncio.sleep(0.1)
        assert late._version == THETA_0
        if how == "load":
            await pool.load(PublishedWeights(THETA_1, (), 8))
        else:
            late.load = FakeSampler.load.__get__(late)  # the folder is there
            await pool.saved(THETA_1, "folder")
        await pool.release(THETA_1)
        await pool.sample(THETA_1, prompts(8 * CHUNK), SETTINGS)
        assert late.num_prompts > 0

    run(scenario)


def test_nobody_waits_for_answers_under_weights_that_are_lost():
    async def scenario():
        pool = await started(Loses(THETA_0), room=CHUNK, max_restarts=1)
        pool._replicas[0].joined = False  # as while it starts anew
        assert await pool.load(weights(THETA_1)) == []
        asked = asyncio.create_task(pool.score(THETA_1, prompts(1), prompts(1), AUDIT))
        pool._spawn(pool._join(pool._replicas[0]))
        with pytest.raises(WeightsLost):
            await asked
        await pool.load(PublishedWeights(THETA_1, (), 8))
        assert len(await pool.score(THETA_1, prompts(1), prompts(1), AUDIT)) == 1

    run(scenario)


def test_weights_of_which_no_bucket_comes_any_more_are_late():
    """However long all of them take."""
    async def scenario():
        arrived = Transport(WeightsConfig(bucket_timeout_s=60.0)).arrived
        slow = PublishedWeights(THETA_1, tuple(asyncio.ensure_future(asyncio.sleep(50.0 * k, k)) for k in range(1, 5)), 4)
        assert await arrived(slow) == [1, 2, 3, 4]
        stuck = PublishedWeights(THETA_1, (asyncio.ensure_future(asyncio.sleep(1.0)), asyncio.get_running_loop().create_future()), 2)
        begun = asyncio.get_running_loop().time()
        with pytest.raises(WeightsLate, match=r"theta_1, 2 buckets, number 2 has not come .* within 60 s \(weights\.bucket_timeout_s\)"):
            await arrived(stuck)
        assert 60 <= asyncio.get_running_loop().time() - begun <= 62

    run(scenario)


class Receives(FakeSampler):
    """What a sender brings does not arrive; what it fetches does."""

    def __init__(self, version, *, breaks=True):
        super().__init__(version)
        self._breaks, self.loaded = breaks, []

    async def load(self, weights):
        self.loaded.append(weights.sender)
        if weights.sender and self._breaks:
            raise TransferFailed(f"{weights.version} did not arrive over gloo: not within weights.timeout_s=1")
        return await super().load(weights)


def test_a_failed_transfer_is_told_counts_as_no_failure_and_is_repeated_without_the_sender():
    async def scenario():
        broken, whole, late = Receives(THETA_0), Receives(THETA_0, breaks=False), Receives(THETA_0)
        ended = []

        def start_anew(handle):
            handle._target = late

        pool = SamplerPool([Handle(broken), Handle(whole)], THETA_0, Limits(64, max_restarts=0), start_anew, end=ended.append)
        await pool.start()
        await pool.ready(2)
        await pool.release(THETA_0)
        sent = PublishedWeights(THETA_1, (), 8, sender="sender")
        assert sorted(await pool.load(sent)) == [0.0, 0.0] and ended == ["sender"]
        await pool.ready(2)
        await pool.release(THETA_1)
        answers = await pool.sample(THETA_1, prompts(8 * CHUNK), SETTINGS)
        assert {answer.version for answer in answers} == {THETA_1} and late.num_prompts and whole.num_prompts
        assert (broken.loaded, whole.loaded, late.loaded) == (["sender"], ["sender"], [None])
        assert await pool.failed_transfers() == ["sampler 0: theta_1 did not arrive over gloo: not within weights.timeout_s=1"]
        assert await pool.failed_transfers() == [] and await pool.num_restarts() == 1
        joins = Receives(THETA_0)
        await pool.add([Handle(joins)])
        await pool.ready(3)
        assert joins.loaded == [None]

    run(scenario)


def test_a_slow_line_is_no_hanging_replica():
    async def scenario():
        pool = await started(FakeSampler(THETA_0, load_s=150.0), request_timeout_s=100.0, bucket_timeout_s=60.0)
        bucket = asyncio.ensure_future(asyncio.sleep(0))
        assert await pool.load(PublishedWeights(THETA_1, (bucket,), 8)) == [150.0] and await pool.num_restarts() == 0

    run(scenario)


def test_weights_that_are_lost_in_a_transfer_are_lost_to_who_fetches_them_too():
    """The learner's worker dies, and with it its sender and what it has published: the next group publishes again."""
    async def scenario():
        class Joins(Receives, Loses):
            pass

        ended = []
        pool = SamplerPool([Handle(Receives(THETA_0))], THETA_0, Limits(64), lambda handle: setattr(handle, "_target", Joins(THETA_0)), end=ended.append)
        await pool.start()
        await pool.ready()
        await pool.load(PublishedWeights(THETA_1, (), 0, sender="first"))
        with pytest.raises(WeightsLost):
            await pool.score(THETA_1, prompts(1), prompts(1), AUDIT)
        await pool.load(PublishedWeights(THETA_1, (), 8, sender="second"))
        assert len(await pool.score(THETA_1, prompts(1), prompts(1), AUDIT)) == 1 and ended == ["first", "second"]

    run(scenario)


class Sleeper(FakeSampler):
    """Remembers what it was told; at the verb `fails` its process dies, and Ray starts another one."""

    def __init__(self, version, *, fails="", **options):
        super().__init__(version, **options)
        self.told, self._fails, self.start_anew = [], fails, None

    async def _note(self, verb):
        self.told.append(verb)
        if verb == self._fails:
            self.start_anew()
            raise ray.exceptions.RayActorError

    async def ready(self):
        await self._note("ready")
        return await super().ready()

    async def sleep(self):
        await self._note("sleep")
        return ()

    async def wake(self):
        await self._note("wake")


def test_sleep_waits_for_what_is_owed_and_for_who_starts_and_nothing_is_answered_before_wake():
    async def scenario():
        quick, late = Sleeper(THETA_0, prompts_per_s=100), Sleeper(THETA_0, start_s=5.0)
        pool = await started(quick, late)
        owed = asyncio.ensure_future(pool.sample(THETA_0, prompts(40), SETTINGS))
        await asyncio.sleep(0)
        await pool.sleep()
        assert owed.done() and [quick.told, late.told] == [["ready", "sleep"]] * 2
        asked = [asyncio.ensure_future(pool.score(THETA_0, prompts(3), prompts(3), urgency)) for urgency in (AUDIT, PLAY, EVALUATE)]
        await asyncio.sleep(100)
        assert not any(request.done() for request in asked)
        await pool.wake()
        assert [len(await request) for request in asked] == [3, 3, 3]

    run(scenario)


@pytest.mark.parametrize("fails", ["sleep", "wake"])
def test_a_replica_that_dies_asleep_starts_when_it_may(fails):
    async def scenario():
        broken, whole = Sleeper(THETA_0, fails=fails), Sleeper(THETA_0)
        pool = await started(broken, whole, max_restarts=1)
        handle, new = pool._replicas[0].handle, Sleeper(THETA_0)
        broken.start_anew = lambda: setattr(handle, "_target", new)
        await pool.sleep()
        await asyncio.sleep(100)
        assert new.told == []  # it touches no device while others compute there
        await pool.wake()
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        assert await pool.ready(2) == 2
        assert {c.version for c in await pool.sample(THETA_1, prompts(8 * CHUNK), SETTINGS)} == {THETA_1}
        assert new.told == ["ready"] and new.num_prompts and await pool.num_restarts() == 1

    run(scenario)


async def with_ends(*samplers, **limits):
    """A pool, and the replicas that it has ended."""
    ended = []
    pool = SamplerPool([Handle(sampler) for sampler in samplers], THETA_0, Limits(64, **limits), restart, ended.append)
    await pool.start()
    await pool.ready()
    await pool.release(THETA_0)
    return pool, ended


def test_who_joins_late_takes_up_the_present_weights_and_works():
    async def scenario():
        pool, _ = await with_ends(FakeSampler(THETA_0))
        await pool.load(weights(THETA_1))
        await pool.release(THETA_1)
        late = FakeSampler(THETA_0)
        await pool.add([Handle(late)])
        await pool.ready(2)
        assert await pool.size() == (2, 2)
        answers = await pool.sample(THETA_1, prompts(8 * CHUNK), SETTINGS)
        assert {answer.version for answer in answers} == {THETA_1} and late.num_prompts > 0

    run(scenario)


def test_who_leaves_finishes_what_it_owes_and_gets_nothing_more():
    async def scenario():
        slow = {"prompts_per_s": 1.0}
        pool, ended = await with_ends(FakeSampler(THETA_0, **slow), FakeSampler(THETA_0, **slow), FakeSampler(THETA_0, **slow))
        asked = asyncio.ensure_future(pool.sample(THETA_0, prompts(6 * CHUNK), SETTINGS))
        await asyncio.sleep(1)
        await pool.retire(2)
        assert await pool.size() == (1, 1) and not ended  # they owe answers
        assert len(await asked) == 6 * CHUNK and len(ended) == 2
        assert len(await pool.sample(THETA_0, prompts(CHUNK), SETTINGS)) == CHUNK and len(await pool.spans()) >= 7
        await pool.retire(5)
        assert await pool.size() == (1, 1)  # one stays

    run(scenario)


def test_who_finds_no_place_is_given_up_and_the_run_goes_on():
    async def scenario():
        pool, ended = await with_ends(FakeSampler(THETA_0), request_timeout_s=100.0, max_restarts=0)
        nowhere = SimpleNamespace(ready=lambda: asyncio.sleep(10**6))
        await pool.add([Handle(nowhere)])
        assert await pool.size() == (1, 2)
        await asyncio.sleep(101)
        await pool.sample(THETA_0, prompts(1), SETTINGS)
        assert await pool.size() == (1, 1) and len(ended) == 1 and await pool.num_restarts() == 0

    run(scenario)


def test_one_that_leaves_may_die_meanwhile():
    async def scenario():
        pool, ended = await with_ends(FakeSampler(THETA_0, prompts_per_s=1.0), FakeSampler(THETA_0, prompts_per_s=1.0), max_restarts=0)
        asked = asyncio.ensure_future(pool.sample(THETA_0, prompts(4 * CHUNK), SETTINGS))
        await asyncio.sleep(1)
        await pool.retire(1)
        (leaving,) = [replica for replica in pool._replicas if replica.leaving]
        for call in leaving.handle._calls:
            call.cancel()
        assert len(await asked) == 4 * CHUNK and len(ended) == 1 and await pool.num_restarts() == 0

    run(scenario)
