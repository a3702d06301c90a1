"""Every order of events, by force: the loop with real coordinator, sampler pool, blocks and manifest, and with fake players.

All of it runs in this process, without Ray. What is sent from one side to the other has a name (`name_of`); a test says in which
order the named messages arrive, and where somebody dies, and each message waits for those before it. Nothing sleeps.
"""

import asyncio
import dataclasses
import functools
import itertools
import json
import math
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch.distributed as dist
from ray._private import auto_init_hook
from test_pool import Handle, restart

from spin_ray.background import in_background
from spin_ray.config import load_config
from spin_ray.errors import BadInput, Diverged, EngineFailed, Enough, RunStopped, WeightsLate, WeightsLost
from spin_ray.exchange.audit import FirstLossError
from spin_ray.exchange.pairs import PlayBlock, Played
from spin_ray.interrupt import Interrupted, Interrupts
from spin_ray.learner import group as learner_group
from spin_ray.learner.coordinator import Base, Coordinator, DriverFailed, Failure
from spin_ray.learner.fake import FakePlayer
from spin_ray.learner.group import Learner
from spin_ray.learner.loop import RolledBack, Worker, WorkerArgs
from spin_ray.learner.messages import Divergence, Publish, Rest, Save, Score, StepRecord, Train
from spin_ray.manifest import RunDir
from spin_ray.placement import Hardware
from spin_ray.players import Players, as_placed
from spin_ray.preflight import Proof
from spin_ray.prepared import written
from spin_ray.records import Prompt, Saved, Version, from_table
from spin_ray.sampler.fake import FakeSampler
from spin_ray.sampler.pool import AUDIT, EVALUATE, Limits, SamplerPool
from spin_ray.selfplay import SelfPlay
from spin_ray.stop import Verdict
from spin_ray.storage import DISK
from spin_ray.terminal import Terminal
from spin_ray.theta import Thetas
from spin_ray.tracking import Tracker

PATIENCE_S = 60
"""After which a run that goes on counts as hanging."""
HARDWARE = Hardware("cpu", "float32", 0, 0, 1e-3, False, 99, "gloo")


class Died(Exception):
    """A worker's process is gone."""


class Messages:
    """Who sends what, in which order it arrives, and who dies instead of sending it."""

    def __init__(self, order=(), deaths=(), hold=()):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._order, self._deaths, self._hold = list(order), list(deaths), set(hold)
        self.sent, self.done, self.ended = [], [], False
        self.records = None
        """What the main player has reported and the driver has not taken."""
        self._changed = asyncio.Condition()
        self._seen = threading.Condition()

    def send(self, name):
        """In the sender's thread."""
        with self._seen:
            self.sent.append(name)
            self._seen.notify_all()
        if name in self._deaths:
            self._deaths.remove(name)
            if "death" in self._order:
                asyncio.run_coroutine_threadsafe(self.arrive("death"), self.loop).result()
            asyncio.run_coroutine_threadsafe(self.arrived("death"), self.loop).result()
            raise Died(name)

    async def arrive(self, name):
        """In the loop: wait until it is this message's turn."""
        before = self._order[: self._order.index(name)] if name in self._order else []
        async with self._changed:
            await self._changed.wait_for(lambda: name not in self._hold and all(other in self.done for other in before))
            if before and name.startswith("hear") and SNAPSHOT not in name:  # the driver, which waits for it, takes all reports first; a snapshot has a thread of its own
                await self._changed.wait_for(lambda: not self.records())

    async def arrived(self, name):
        async with self._changed:
            self.done.append(name)
            self._changed.notify_all()
        with self._seen:
            self._seen.notify_all()

    def let_all_go(self):
        self._order.clear()
        for name in [*self._hold, "nothing"]:
            self.let_go(name)

    def let_go(self, name):
        async def let_go():
            async with self._changed:
                self._hold.discard(name)
                self._changed.notify_all()

        asyncio.run_coroutine_threadsafe(let_go(), self.loop).result()

    def wait(self, condition, timeout=PATIENCE_S):
        with self._seen:
            return self._seen.wait_for(condition, timeout)

    def wait_until_sent(self, name):
        with self._seen:
            assert self._seen.wait_for(lambda: name in self.sent, timeout=PATIENCE_S), f"{name} was never sent: {self.sent}"


class Reference:
    """What `actor.verb.remote(...)` returns."""

    def __init__(self, future):
        self._future = future

    def future(self):
        return self._future

    def __await__(self):
        return asyncio.wrap_future(self._future).__await__()


class Put:
    """What `ray.put` returns; it lives as long as the group of workers that has put it."""

    def __init__(self, value, owner=None):
        self.value, self.owner = value, owner

    def __await__(self):
        if self.owner and self.owner.dead:
            raise WeightsLost("their worker has died")
        yield from ()
        return self.value


def get(value):
    if isinstance(value, list):
        return [get(one) for one in value]
    if isinstance(value, Put):
        return value.value
    return value.future().result() if isinstance(value, Reference) else value


class Actor:
    """An object of the loop's thread as other threads see an actor."""

    def __init__(self, target, messages, name_of):
        self._target, self._messages, self._name_of = target, messages, name_of

    def __getattr__(self, verb):
        return SimpleNamespace(remote=lambda *args: self._call(verb, args))

    def _call(self, verb, args):
        name = self._name_of(verb, args)
        if name:
            self._messages.send(name)

        before, after = self._in_line(verb)

        async def call():
            if name:
                await self._messages.arrive(name)
            if before:
                await asyncio.wait([asyncio.wrap_future(before)])
            answer = await getattr(self._target, verb)(*args)
            await self._messages.arrived(name or verb)
            return answer

        future = asyncio.run_coroutine_threadsafe(call(), self._messages.loop)
        after(future)
        return Reference(future)

    def _in_line(self, verb):
        """(the call that must be done before this one, what to tell of this one)."""
        return None, lambda future: None


def name_of_pool(verb, args):
    match verb:
        case "load" | "load_again":
            return f"{verb} {args[0].version}".replace("_again", " again")
        case "release" | "saved":
            return f"{verb} {args[0]}"
        case "sleep" | "wake":
            return verb
        case "score" | "sample" if args[3] in (AUDIT, EVALUATE):
            return f"{'audit' if args[3] == AUDIT else 'evaluate'} {args[0]}"
        case "play" if args[4] == EVALUATE:
            return f"evaluate {args[0]}"
        case "likelihood":
            return f"ask {args[0]}"


class Box(Actor):
    """The coordinator; what is posted gives results their names."""

    def __init__(self, target, messages):
        super().__init__(target, messages, self._name)
        self._posted, self._logs, self._joined, self._turns, self.sender = [], {}, 0, 0, lambda: None

    def _in_line(self, verb):
        if verb != "log":
            return super()._in_line(verb)
        return self._logs.get(self.sender()), functools.partial(self._logs.__setitem__, self.sender())  # as Ray does: one caller's calls in order

    def _name(self, verb, args):
        match verb:
            case "post":
                self._posted.append(args[0][0].value)
            case "answer":
                return f"answer {self._key(args[0])}"
            case "give_away":
                return f"answer {self._key(args[0])}"
            case "let_in":
                return verb
            case "turn":
                self._turns += 1
                return f"turn {self._turns}"
            case "result":
                return f"hear {self._key(args[0])}"
            case "log" if isinstance(args[0], StepRecord):
                return f"step {args[0].iteration}.{args[0].step}"
            case "log" if isinstance(args[0], Divergence):
                return f"divergence {args[0].iteration}.{args[0].step}"
            case "move_base":
                return f"base {args[0].iteration}"
            case "join":
                self._joined += 1
                return f"join {self._joined}"
            case "fail" | "interrupt":
                return verb

    def _key(self, key):
        if isinstance(key, Version):
            return str(key)
        match self._posted[key]:
            case Train(iteration=t):
                return f"train {t}"
            case Publish(version=version):
                return f"weights {version.number}"
            case Rest():
                return f"rest {sum(isinstance(command, Rest) for command in self._posted[:key])}"
            case Save():
                return f"save {sum(isinstance(command, Save) for command in self._posted[:key + 1])}"
            case Score():
                return f"probe {sum(isinstance(command, Score) for command in self._posted[:key])}"


class ScriptedPlayer(FakePlayer):
    """Its loss is what the script says for (group, iteration, step)."""

    def __init__(self, script, group, device):
        super().__init__(itertools.repeat(1e9), 0.0, 0.0, 0.0)
        self._script, self._group, self._t, self._step = script, group, -1, 0
        self._device = device
        device.take("main player")

    def rest(self):
        self._device.leave("main player")

    def wake(self):
        self._device.take("main player")

    def score(self, pairs, *, copy=None):
        self._t = pairs[0].iteration
        return np.zeros((len(pairs), 3, 2))

    def begin_iteration(self):
        super().begin_iteration()
        self._step = 0

    def load_checkpoint(self, folder, *, name=""):
        super().load_checkpoint(folder, name=name)
        self._step = int(folder.name.removeprefix("step_"))

    def step(self, pairs, references, **options):
        metrics = super().step(pairs, references, **options)
        loss = self._script.get((self._group, pairs[0].iteration, self._step), math.log(2))
        self._step += 1
        return {**metrics, "loss": loss, "pair_loss": loss}


class Device:
    """Who has memory on it. Where the players take turns, never two."""

    def __init__(self, takes_turns):
        self._takes_turns, self._there, self.log = takes_turns, set(), []

    def take(self, name):
        if self._takes_turns:
            assert not self._there - {name}, f"{name} comes while {self._there} is there"
        self._there.add(name)
        self.log.append(name)

    def leave(self, name):
        self._there.discard(name)


class DeviceSampler(FakeSampler):
    def __init__(self, version, device):
        super().__init__(version)
        self._device = device

    async def ready(self):
        self._device.take("opponent")
        return await super().ready()

    async def sleep(self):
        self._device.leave("opponent")
        return await super().sleep()

    async def wake(self):
        self._device.take("opponent")


class LocalLearner(Learner):
    """One worker, in a thread; a group of its kind follows where it dies, as Ray Train does it."""

    def __init__(self, config, hardware, run, messages, script):
        self._box = Coordinator(Base(Saved("sft"), None), max_restarts=config.learner.max_restarts, at_rest=hardware.takes_turns)
        messages.records = lambda: self._box._records
        self.coordinator = Box(self._box, messages)
        self._args = WorkerArgs(
            self.coordinator, config.learner, hardware, False, 0, str(run.logs), DISK, None, rollback_lr_factor=config.guard.rollback_lr_factor
        )
        self._script, self._here, self._failed = script, threading.local(), False
        self.device = Device(hardware.takes_turns)
        self.coordinator.sender = lambda: id(self._here.group)
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def join(self):
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def put(self, value):
        """`ray.put`: in a worker's thread, the worker owns it."""
        return Put(value, getattr(self._here, "group", None))

    def _fit(self):
        ended = False
        while not ended:
            if isinstance(get(self.coordinator.turn.remote()), Failure) or isinstance(joined := get(self.coordinator.join.remote()), Failure):
                return
            self._here.group = SimpleNamespace(dead=False)
            try:
                self._work(joined)
                ended = True
            except (Died, RolledBack) as error:
                self._here.group.dead = True
                self.device.leave("main player")
                get(self.coordinator.group_ended.remote(f"rank 0: {error}"))
            except (BadInput, RunStopped) as error:
                get(self.coordinator.fail.remote(Failure(error)))
                return
            except DriverFailed:
                return

    def _work(self, joined):
        Worker(ScriptedPlayer(self._script, joined.group, self.device), self._args, joined).serve()


class Chat:
    stop_ids = (1,)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)), chat_template="")

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    auto_init_hook.enable_auto_connect = False  # a thread that outlives its test must not start a Ray
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('dist')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(*overrides, order=..., deaths=..., hold=..., script=...) -> a run under way."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(learner_group, "POLL_S", 0.01)
    monkeypatch.setattr("spin_ray.learner.loop.own_devices", lambda: ())
    monkeypatch.setattr("spin_ray.timeline.Timeline.draw", lambda self: None)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)

    def start(*overrides, script=None, samplers=None, heldout=0, tasks=None, here=False, **messages):
        config, _ = load_config("conf/demo.yaml", [
            f"run.dir={tmp_path}", "run.name=orders", "model.path=sft", "data.train=x", "data.eval=''", "spin.num_iterations=2", "spin.num_epochs=2",
            "sampler.block_prompts=8", "learner.batch_pairs=8", "spin.nll_weight=0", "overlap.mode=lookahead", "overlap.lookahead_fraction=0.3",
            "reference.scorer=frozen", *overrides,
        ])
        runs.append(Run(config, Messages(**messages), script or {}, samplers, heldout, tasks, monkeypatch))
        return runs[-1] if here else runs[-1].go_beside()

    runs: list[Run] = []
    yield start
    for run in runs:  # none of their threads may outlive the patches
        run.end()


class Run:
    """A run of the loop in a thread of its own."""

    def __init__(self, config, messages, script, samplers, heldout, tasks, monkeypatch):
        self.run, self.messages, self.interrupts = RunDir.open(config), messages, Interrupts()
        self._hardware = hardware = dataclasses.replace(HARDWARE, takes_turns=config.placement.mode == "shared")
        config = as_placed(config, hardware, lambda line: None)
        self._learner = learner = LocalLearner(config, hardware, self.run, messages, script)
        monkeypatch.setattr(ray, "put", learner.put)
        monkeypatch.setattr("spin_ray.opponent.play", self._play)
        first = Version(len(self.run.marks("iteration")))
        handles = [Handle(sampler) for sampler in samplers or [DeviceSampler(first, learner.device)]]
        pool = SamplerPool(handles, first, Limits(64, max_restarts=3), restart)
        asyncio.run_coroutine_threadsafe(pool.start(), messages.loop).result()
        ids = np.random.default_rng(0).integers(5, 500, (24 + heldout, 12)).astype(np.int32)
        prompts = [Prompt(number, row[:6], row[6:]) for number, row in enumerate(ids)]
        prepared = written(self.run, prompts[:24], prompts[24:], 8)
        self._go = functools.partial(self._go_on, config, prepared, Players(Actor(pool, messages, name_of_pool), learner, hardware.takes_turns))
        self._tasks = tasks
        self._playing, self.learner, self.device = None, learner, learner.device

    def end(self):
        """Whatever still waits raises."""
        self.messages.let_all_go()
        self._learner.fail(RunStopped("the test is over"))
        self._learner.join()

    def go(self):
        """In this thread."""
        self._go()

    def go_beside(self):
        self._playing = in_background(self._go)
        return self

    def _go_on(self, config, prepared, players):
        facts = SimpleNamespace(chat=Chat(), path="sft", adapter="", saved=Saved("sft"))
        with Tracker(config, self.run.path) as tracker, (self.run.path / "terminal").open("w") as file:
            self.self_play = SelfPlay(config, Thetas(self.run, config.lora, facts.saved), facts, prepared, self._hardware, players, Proof(), tracker, Terminal(file), self.interrupts, self._tasks)
            self.self_play.play()
        players.learner.stop()

    def _play(self, plan, blocks, num_in_flight):
        """Ray Data's pipeline, in the loop: the same stage, block by block in order."""
        stage = PlayBlock(plan, blocks)
        waiting = [
            asyncio.run_coroutine_threadsafe(stage({"place": np.array([place])}), self.messages.loop) for place in range(len(blocks))
        ]
        for block, table in zip(blocks, waiting, strict=True):
            yield block, from_table(table.result(), Played)[0]

    def result(self):
        """Until it has ended; raises what it raised, or that it hangs."""
        try:
            return self._playing.result(timeout=PATIENCE_S)
        except TimeoutError:
            raise AssertionError(f"hangs; sent {self.messages.sent[-12:]}, arrived {self.messages.done[-12:]}") from None

    @property
    def is_over(self):
        return self._playing.done()

    def metrics(self, key):
        lines = [json.loads(line) for line in (self.run.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if key in line]

    def steps(self, t):
        return [line["step"] for line in self.metrics("train/loss") if line["iteration"] == t]

    def pairs(self, t):
        return [row for path in sorted(self.run.path.glob(f"iter_00{t}/pairs/*.parquet")) for row in pq.read_table(path).to_pylist()]

    def assert_whole(self, *, iterations=2, again=(), resumed=0):
        """Finished; each iteration audited before its first loss was checked, each step logged once, in order.

        `again`: iterations of which a group that ended may have been heard first, from step 0 on; `resumed`: the next one went on
        from progress.
        """
        assert [mark["iteration"] for mark in self.run.marks("iteration")] == list(range(iterations)) and self.run.marks("finished")
        for t in range(iterations):
            total = self.self_play._overlap.num_steps(t)
            steps = self.steps(t)
            assert steps[-total:] == list(range(total)) or (resumed and set(steps) == set(range(total))), (t, steps)
            assert len(steps) == total or t in again, (t, steps)
        lines = [json.loads(line) for line in (self.run.path / "metrics.jsonl").read_text().splitlines()]
        judged = [line["opponent_version"] for line in lines if "audit/first_loss_deviation" in line]
        assert judged == [line["iteration"] for line in lines if "train/loss" in line and line["step"] == 0]
        for t in range(iterations):
            audited = next(k for k, line in enumerate(lines) if "audit/max_abs_logp_difference_nats" in line and line["opponent_version"] == t)
            checked = next(k for k, line in enumerate(lines) if "audit/first_loss_deviation" in line and line["opponent_version"] == t)
            first = next(k for k, line in enumerate(lines) if "train/loss" in line and line["iteration"] == t)
            assert audited < checked < first


BORDER = ["load theta_1", "hear probe 1", "audit theta_1", "hear save 1", "base 1", "release theta_1"]
"""What the driver does at the first border, in its order."""


def merges(left, right):
    """All orders of the events of both that keep each one's order."""
    for places in itertools.combinations(range(len(left) + len(right)), len(right)):
        rest, mixed = iter(left), iter(right)
        yield [next(mixed) if k in places else next(rest) for k in range(len(left) + len(right))]


def orders_with(event, *more):
    """The border, with these events, one right after the other, at every place of it."""
    return [[*BORDER[:place], event, *more, *BORDER[place:]] for place in range(len(BORDER) + 1)]


ALL_AHEAD = ["spin.replay=0", "overlap.lookahead_fraction=0.99"]
"""The snapshot plays all of iteration 1, so that its training may be over before theta_1 is released."""
SNAPSHOT = "theta_1 less 2 steps"


def in_order(run, order):
    places = [run.messages.done.index(name) for name in order]
    return places == sorted(places)


def test_the_usual_order(start):
    run = start()
    run.result()
    run.assert_whole()


@pytest.mark.parametrize("order", list(merges(BORDER, ["step 1.0", "answer train 1"])), ids=" < ".join)
def test_the_next_iteration_s_training_at_any_moment_of_the_border(start, order):
    run = start(*ALL_AHEAD, order=order)
    run.result()
    run.assert_whole()
    assert in_order(run, order)


def test_nothing_counts_before_the_audit_and_nothing_is_released(start):
    run = start(*ALL_AHEAD, hold=["audit theta_1"])
    run.messages.wait_until_sent("audit theta_1")
    run.messages.wait_until_sent("answer train 1")  # the main player has finished the last iteration
    assert run.steps(1) == [] and not run.run.marks("iteration")[:1] and not {"base 1", "saved theta_1", "release theta_1"} & {*run.messages.sent}
    run.messages.let_go("audit theta_1")
    run.result()
    run.assert_whole()


@pytest.mark.parametrize("order", [
    ["answer train 0", f"hear {SNAPSHOT}"], ["answer save 1", f"hear {SNAPSHOT}"], ["step 0.5", f"load {SNAPSHOT}"],
    ["answer save 1", f"load {SNAPSHOT}"], ["answer save 1", f"release {SNAPSHOT}"], [f"release {SNAPSHOT}", "step 0.5"],
], ids=" < ".join)
def test_a_snapshot_that_is_late(start, order):
    run = start(order=order)
    run.result()
    run.assert_whole()
    assert in_order(run, order)
    early = [pair for pair in run.pairs(1) if pair["opponent_steps_early"]]
    assert len(early) == 8 and {pair["opponent_steps_early"] for pair in early} == {2}


WORKERS_SAY = [*(f"step 0.{k}" for k in range(6)), f"answer {SNAPSHOT}", "answer train 0", "answer weights 1", "answer probe 1", "answer save 1",
               *(f"step 1.{k}" for k in (0, 1, 11)), "answer train 1", "answer save 2"]


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("last_word", WORKERS_SAY)
def test_a_group_that_dies_at_any_word(start, last_word, every):
    """With and without progress that its successor may take up."""
    run = start(f"learner.checkpoint_every_steps={every}", deaths=[last_word])
    run.result()
    run.assert_whole(again=(0, 1), resumed=every)


@pytest.mark.parametrize("order", [*orders_with("death", "join 2"), *(
    [*BORDER[:place], "death", BORDER[place], "join 2", *BORDER[place + 1 :]] for place in range(len(BORDER))
    if BORDER[place] not in ("load theta_1",)
)], ids=" < ".join)
@pytest.mark.parametrize("every", [0, 1])
def test_a_group_that_dies_in_iteration_1_at_any_moment_of_the_border(start, order, every):
    """Before theta_1 is durable, nothing that it said of iteration 1 counts, and no progress that it saved there."""
    run = start(*ALL_AHEAD, f"learner.checkpoint_every_steps={every}", order=order, deaths=["step 1.3"])
    run.result()
    lost = order.index("join 2") < order.index("base 1")
    run.assert_whole(again=(0,) if lost else (1,), resumed=every)
    if lost:
        assert run.steps(1) == list(range(6))


@pytest.mark.parametrize("order", orders_with("divergence 1.1"), ids=" < ".join)
@pytest.mark.parametrize("answer", ["stop", "rollback"])
def test_a_divergence_of_iteration_1_at_any_moment_of_the_border(start, order, answer):
    """It is answered when theta_1 is durable: only iteration 1 starts over, or ends the run."""
    run = start(*ALL_AHEAD, f"guard.on_divergence={answer}", order=order[: order.index("base 1") + 1] if answer == "stop" else order,
                script={(1, 1, 1): math.nan})
    if answer == "stop":
        with pytest.raises(Diverged, match="iteration 1, step 1: loss is nan"):
            run.result()
        assert run.steps(0) == list(range(6)) and run.steps(1) == [0] and len(run.run.marks("iteration")) == 1
        return
    run.result()
    assert [mark["iteration"] for mark in run.run.marks("rollback")] == [1]
    assert run.steps(0) == list(range(6)) and run.steps(1) == [0, *range(6)]
    run.assert_whole(again=(1,))


def test_a_first_loss_that_is_wrong_ends_the_run_also_where_its_training_is_over_before_the_audit(start):
    run = start(*ALL_AHEAD, order=["answer train 1", "audit theta_1"], script={(1, 1, 0): 0.71})
    with pytest.raises(FirstLossError, match=r"first loss of iteration 1 is 0\.710000"):
        run.result()
    assert len(run.run.marks("iteration")) == 1 and "release theta_1" not in run.messages.sent


@pytest.mark.parametrize("mode", ["stream", "lookahead"])
@pytest.mark.parametrize("order", [
    [], ["load theta_1", "evaluate theta_0"], ["release theta_1", "evaluate theta_0"], ["step 1.1", "evaluate theta_0"],
    ["answer save 2", "evaluate theta_1"], ["load theta_2", "evaluate theta_1"], ["release theta_3", "evaluate theta_2"],
    ["answer save 3", "evaluate theta_0"],
], ids=" < ".join)
def test_an_evaluation_that_is_put_off(start, order, mode):
    if order[1:] == ["evaluate theta_0"] and order[0] == "answer save 3":
        order = ["answer save 2", "evaluate theta_0"]
    run = start(f"overlap.mode={mode}", "spin.num_iterations=3", "spin.replay=0", heldout=4, order=order)
    run.result()
    run.assert_whole(iterations=3)
    assert sorted(mark["version"] for mark in run.run.marks("evaluation")) == [0, 1, 2, 3]
    assert in_order(run, order)


class OneTask:
    """Stands for spin_ray.tasks: one question."""

    def evaluate(self, pool, version):
        question = np.arange(5, 9, dtype=np.int32)
        [found] = ray.get(pool.likelihood.remote(version, [question], [question], EVALUATE))
        return SimpleNamespace(metrics=lambda: {"made_acc": float(found.greedy)}, line=lambda: "made acc", as_json=lambda: {"tasks": {}})


@pytest.mark.parametrize("heldout", [0, 4])
@pytest.mark.parametrize("mode", ["sequential", "stream", "lookahead"])
@pytest.mark.parametrize("order", [
    [], ["load theta_1", "ask theta_0"], ["step 1.1", "ask theta_0"], ["answer save 2", "ask theta_1"], ["release theta_3", "ask theta_2"],
], ids=" < ".join)
def test_tasks_are_asked_of_every_version_whenever_samplers_are_free(start, order, mode, heldout):
    given = f"overlap.mode={mode}", "spin.num_iterations=3", "spin.replay=0"
    run = start(*given, heldout=heldout, tasks=OneTask(), order=order)
    run.result()
    run.assert_whole(iterations=3)
    assert sorted(mark["version"] for mark in run.run.marks("tasks")) == [0, 1, 2, 3] and in_order(run, order)
    assert sorted(line["opponent_version"] for line in run.metrics("tasks/made_acc")) == [0, 1, 2, 3]
    assert len(run.run.marks("evaluation")) == (4 if heldout else 0)


@pytest.mark.parametrize("lost", [[3], [2, 3], []])
def test_a_session_asks_only_what_no_earlier_one_has_marked(start, lost):
    given = "spin.num_iterations=3", "overlap.mode=stream"
    run = start(*given, tasks=OneTask())
    run.result()
    manifest = run.run.path / "manifest.jsonl"
    lines = [line for line in manifest.read_text().splitlines() if json.loads(line)["stage"] != "finished"]
    kept = [line for line in lines if json.loads(line)["stage"] != "tasks" or json.loads(line)["version"] not in lost]
    manifest.write_text("".join(f"{line}\n" for line in kept))
    again = start(*given, tasks=OneTask())
    again.result()
    assert sorted(mark["version"] for mark in again.run.marks("tasks")) == [0, 1, 2, 3]
    assert sorted(line["opponent_version"] for line in again.metrics("tasks/made_acc")) == sorted([0, 1, 2, 3, *lost])


def test_an_evaluation_is_put_off_once(start):
    run = start("overlap.mode=stream", "spin.num_iterations=3", heldout=4, hold=["evaluate theta_0"])
    run.messages.wait_until_sent("answer save 2")
    assert "load theta_2" not in run.messages.sent
    run.messages.let_go("evaluate theta_0")
    run.result()
    run.assert_whole(iterations=3)


@pytest.mark.parametrize("version, held", [
    *itertools.product((0, 1), ("", "step 1.2", "load theta_2", "audit theta_2", "answer save 2", "release theta_2", "answer train 2")),
    (2, ""), (2, "step 2.2"), (2, "answer train 2"), (2, "load theta_3"), (2, "answer save 3"),
])
def test_a_run_that_has_nothing_more_to_gain_ends_wherever_it_waits(start, monkeypatch, version, held):
    """The verdict on theta_version comes when it comes: what is marked then stands, the run is finished, and says why."""
    monkeypatch.setattr("spin_ray.evaluation.judge", lambda history, spin: Verdict(0, "made up" * (history[-1].version == version)))
    run = start("overlap.mode=stream", "spin.num_iterations=3", heldout=4, hold=[held] if held else [])
    try:
        run.result()
    except Enough as end:
        assert str(end) == "made up"
        assert [mark["reason"] for mark in run.run.marks("stopped")] == ["made up"] and len(run.run.marks("iteration")) < 3 + (not held)
    else:
        assert version == 2 and not held and len(run.run.marks("iteration")) == 3  # the verdict came when all was trained
    assert run.run.marks("finished") and run.run.best() == "sft"


WAITS = ["audit theta_0", f"load {SNAPSHOT}", "load theta_1", "audit theta_1", "saved theta_1", "release theta_1", "evaluate theta_0", "evaluate theta_2"]
"""What the driver waits for, of the opponent."""


def fails(error):
    raise error


@pytest.mark.parametrize("held", WAITS)
@pytest.mark.parametrize("who", ["a thread", "the learner"])
def test_an_error_ends_every_wait_for_the_opponent_at_once(start, held, who):
    """What is waited for is never answered."""
    run = start(hold=[held], heldout=4)
    run.messages.wait_until_sent(held)
    error = RunStopped(f"{who} has failed")
    if who == "a thread":
        run.self_play._threads.start(fails, error)
    else:
        run.self_play._learner.coordinator.fail.remote(Failure(error))
    if (who, held) == ("the learner", "evaluate theta_2"):  # which has nothing to train any more: its end is no failure of the run
        run.messages.let_go(held)
        run.result()
        return
    with pytest.raises(RunStopped, match=f"{who} has failed"):
        run.result()
    assert held not in run.messages.done


@pytest.mark.parametrize("held", [*WAITS, "hear train 0", "hear weights 1", "hear save 1", "hear train 1"])
def test_ctrl_c_ends_every_wait_at_once_and_the_next_session_ends_the_run(start, held):
    """In an iteration, and at its border, it takes a second one."""
    run = start(hold=[held], heldout=4, here=True)
    thread = threading.main_thread().ident

    def interrupt():
        run.messages.wait_until_sent(held)
        while not run.interrupts.requested and not run.messages.ended:
            signal.pthread_kill(thread, signal.SIGINT)
            run.messages.wait(lambda: run.interrupts.requested or run.messages.ended, 1)
        if not run.messages.ended:
            signal.pthread_kill(thread, signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run.interrupts.listen()
    pressing = in_background(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.go()
    finally:
        run.messages.ended = True
        pressing.result(timeout=PATIENCE_S)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert held not in run.messages.done
    done = len(run.run.marks("iteration"))
    again = start(heldout=4)
    again.result()
    assert len(again.run.marks("iteration")) == 2 and again.run.marks("finished") and done <= 1 + (held == "evaluate theta_2")
    assert sorted({mark["version"] for mark in again.run.marks("evaluation")}) == [0, 1, 2]


def test_one_ctrl_c_at_the_border_leaves_theta_1_durable(start):
    """Also where the workers, who are ahead in iteration 1, have ended for it before the driver has loaded theta_1."""
    run = start(*ALL_AHEAD, hold=["hear weights 1", "step 1.2"], order=["fail", "load theta_1"], here=True)
    run.go_beside()
    run.messages.wait_until_sent("hear weights 1")
    run.messages.wait_until_sent("step 1.2")
    run.interrupts.requested = True
    assert run.messages.wait(lambda: "interrupt" in run.messages.done, PATIENCE_S)
    run.messages.let_go("step 1.2")
    run.messages.let_go("hear weights 1")
    with pytest.raises(Interrupted, match="of iteration 1; the same command goes on"):
        run.result()
    assert len(run.run.marks("iteration")) == 1 and (run.run.progress(1) / "count.json").exists()
    again = start(*ALL_AHEAD)
    again.result()
    assert len(again.run.marks("iteration")) == 2 and again.run.marks("finished")


def test_a_run_that_goes_on_may_train_before_its_audit(start):
    """All blocks of iteration 1 are on disk."""
    run = start("overlap.mode=stream", hold=["hear train 1"])
    run.messages.wait_until_sent("answer train 1")
    run.self_play._threads.fail(RunStopped("enough"))
    run.messages.let_go("hear train 1")
    with pytest.raises(RunStopped, match="enough"):
        run.result()
    (run.run.path / "metrics.jsonl").unlink()
    again = start("overlap.mode=stream", order=["step 1.0", "answer train 1", "audit theta_1"])
    again.result()
    assert again.steps(1) == list(range(12)) and len(again.metrics("audit/first_loss_deviation")) == 1


class FailsToLoad(FakeSampler):
    """Its engine breaks at its n-th load."""

    def __init__(self, n):
        super().__init__(Version(0))
        self._left = n

    async def load(self, weights):
        self._left -= 1
        if self._left == 0:
            raise EngineFailed("at a load")
        return await super().load(weights)


@pytest.mark.parametrize("samplers", [
    *([FakeSampler(Version(0), fail_after=n)] for n in (0, 5, 20, 40, 60, 80, 100, 120)), *([FailsToLoad(n)] for n in (1, 2, 3)),
    [FakeSampler(Version(0), fail_after=30), FakeSampler(Version(0), fail_after=50)],
], ids=range(12))
def test_a_replica_that_dies_at_any_moment(start, samplers):
    run = start(samplers=samplers, heldout=4)
    run.result()
    run.assert_whole()
    assert max(line["sampler/num_restarts"] for line in run.metrics("sampler/num_restarts")) <= 2


@pytest.mark.parametrize("order", [
    order for order in orders_with("death", "join 2")
    if order.index("death") < order.index("hear save 1") or order.index("death") > order.index("release theta_1")
], ids=" < ".join)
def test_a_group_that_dies_while_its_weights_are_on_their_way(start, order):
    """In `stream`: with its last word of iteration 0, or its first of iteration 1, which it cannot say before theta_1 is released."""
    run = start("overlap.mode=stream", order=order, deaths=["answer save 1"] if order.index("death") < order.index("hear save 1") else ["step 1.0"])
    run.result()
    run.assert_whole(again=(0, 1))


class FarAway(FakeSampler):
    """What the main player publishes never comes; it sees the run directory."""

    async def load(self, weights):
        if weights.buckets:
            raise WeightsLate("late")
        assert (Path(weights.saved_at.model) / "fake").exists()
        return await super().load(weights)


@pytest.mark.parametrize("mode", ["overlap.mode=stream", "overlap.mode=sequential", "placement.mode=shared"])
@pytest.mark.parametrize("last_word", ["", *(word for word in WORKERS_SAY if word != f"answer {SNAPSHOT}")])
def test_weights_that_never_come_are_read_in_the_run_directory(start, mode, last_word):
    """Whatever becomes of the group that wrote them."""
    run = start(mode, samplers=[FakeSampler(Version(0)), FarAway(Version(0))], heldout=4, deaths=[last_word] if last_word else [])
    run.result()
    run.assert_whole(again=(0, 1))
    assert {line["opponent_version"] for line in run.metrics("sync/from_run_dir") if line["sync/from_run_dir"]} == {1, 2}
    assert (run.run.path / "terminal").read_text().count("late; the samplers read them in the run directory") >= 2


def test_a_snapshot_that_never_comes_ends_the_run(start):
    run = start(samplers=[FarAway(Version(0))])
    with pytest.raises(RunStopped, match="late; a snapshot lies nowhere else: mend the line"):
        run.result()


@pytest.mark.parametrize("used", [True, False])
def test_a_divergence_of_the_group_after_the_one_whose_snapshot_was_taken(start, used):
    """A rollback would leave pairs behind that a snapshot of the lost training wrote, if it has been taken; else it is none the wiser."""
    order = [f"load {SNAPSHOT}", "death", "join 2"] if used else ["death", "join 2", "divergence 0.1", f"hear {SNAPSHOT}"]
    run = start("guard.on_divergence=rollback", order=order, deaths=["step 0.5"], script={(2, 0, 1): math.nan})
    if used:
        with pytest.raises(Diverged, match="not rolled back: a snapshot of this training has played pairs of the next iteration"):
            run.result()
        return
    run.result()
    run.assert_whole(again=(0,))
    assert [mark["iteration"] for mark in run.run.marks("rollback")] == [0] and in_order(run, order)
    assert {pair["opponent_steps_early"] for pair in run.pairs(1)} == {0, 2}


SHARED = ("placement.mode=shared",)
PLAYED, LEARNT = "opponent", "main player"


def test_players_that_take_turns_are_never_on_the_device_together(start):
    run = start(*SHARED, heldout=6)
    run.result()
    run.assert_whole()
    assert run.device.log == [PLAYED, LEARNT, PLAYED] + [LEARNT, PLAYED] * 2  # engine, audit's other side, audit and play; then two iterations
    assert sorted(run.run.evaluations()) == [0, 1, 2]


@pytest.mark.parametrize("death", [
    "turn 2", "turn 3", "answer probe 0", "answer rest 0", "step 0.0", "step 0.5", "answer train 0", "answer weights 1", "answer probe 1",
    "answer save 1", "answer rest 1", "step 1.0", "answer train 1", "answer weights 2", "answer save 2", "answer rest 2",
])
def test_a_group_that_dies_where_players_take_turns(start, death):
    """At rest it joins again when it is its turn, and whoever holds the device goes on."""
    run = start(*SHARED, heldout=6, deaths=[death])
    run.result()
    run.assert_whole(again=[int(death[5])] if death.startswith("step") else [0, 1])


def test_weights_that_die_with_a_group_at_rest_are_made_again_in_its_turn(start):
    """The group dies after it has given the device away, before the opponent has loaded what it published."""
    run = start(*SHARED, heldout=6, hold=["load theta_1"], deaths=["turn 3"])
    run.messages.wait_until_sent("load theta_1")
    run.messages.wait(lambda: run.learner._box._deaths == 1)
    run.messages.let_go("load theta_1")
    run.result()
    run.assert_whole(again=[0])


@pytest.mark.parametrize("message", ["sleep", "wake", "answer rest 1"])
def test_a_failure_ends_who_waits_for_its_turn(start, message):
    run = start(*SHARED, hold=[message])
    run.messages.wait_until_sent(message)
    run.self_play._threads.fail(RunStopped("planted"))
    with pytest.raises(RunStopped, match="planted"):
        run.result()
