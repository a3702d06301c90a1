"""Iterations of a run as events: every block through the play processes, the pool, a replica, the driver and the coordinator to the ranks.

    slot free ─► play process ─► pool ─► replica ─► pool ─► play process ─► driver ─┬─► in order ─► coordinator ─► ranks ─► training
         ▲                                                                          │
         └──────────────────────────────────────────────────────────────────────────┘
    training over ─► commands ─► pool: every replica loads ─► pool and driver: spans ─► released: the next iteration's blocks begin

Each control process is a queue with one core; a replica plays one block after the other at its rate. Players that are told to take no
time of the control plane (`Costs()`) give the day that it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spin_ray.bench.costs import CHUNK, Costs
from spin_ray.bench.queues import Clock, Process, Servers

HEARTBEAT_S = 5.0
"""That of sampler/pool.py."""
POLLS_PER_S = 5
"""How often the driver asks what the workers have to say, while it follows them."""
BLOCKS_PER_PROCESS = 256
"""Blocks in flight in one play process, as in placement.py."""


@dataclass(frozen=True)
class Setup:
    """A run: its size, its players' speed, and the work of an iteration."""

    replicas: int
    workers: int
    prompts: int
    """Of an iteration; from iteration 1 on as many replayed pairs come with them."""
    drawn_per_s: float
    """Prompts that one replica answers."""
    scored_per_s: float
    """Given answers that one replica scores."""
    trained_per_s: float
    """Pairs that the main player takes, all workers together, each epoch counted."""
    batch_pairs: int = 64
    block_prompts: int = 256
    epochs: int = 2
    room: int = 256
    """Answers that a replica writes at a time."""
    load_s: float = 0.0
    """What new weights take to be published and loaded."""
    iterations: int = 2
    """Those after iteration 1 would be like it."""

    @property
    def in_flight(self) -> int:
        """Blocks, as in placement.py."""
        return 2 * self.replicas * -(-self.room // self.block_prompts) + 1

    @property
    def play_processes(self) -> int:
        return -(-self.in_flight // BLOCKS_PER_PROCESS)


@dataclass
class Outcome:
    """What came of it."""

    iteration_s: list[float] = field(default_factory=list)
    """From an iteration's release until the next one's."""
    played_s: list[float] = field(default_factory=list)
    """From an iteration's release until its last block has reached the ranks."""
    busy_s: dict[str, float] = field(default_factory=dict)
    """Of each control process; of the play processes together."""
    busy_playing_s: dict[str, float] = field(default_factory=dict)
    """The same while blocks are played."""
    longest_wait_s: dict[str, float] = field(default_factory=dict)
    pairs_trained: float = 0.0
    waited_s: float = 0.0
    """Of the main player, for blocks and at borders."""
    ended_s: float = 0.0


class Day:
    """One simulation, from the start of the players on; `run` returns what came of it."""

    def __init__(self, setup: Setup, costs: Costs):
        self._setup, self._pool_costs, self._costs = setup, costs.pool, costs.loop
        self._clock, self._replicas = Clock(), Servers(setup.replicas)
        self._pool, self._driver, self._coordinator = Process(), Process(), Process()
        self._players = [Process() for _ in range(setup.play_processes)]
        self._outcome = Outcome()
        self._iteration, self._at_replicas = -1, 0
        self._sizes = [
            min(setup.block_prompts, setup.prompts - start) for start in range(0, setup.prompts, setup.block_prompts)
        ]
        self._plenty = len(self._sizes) >= 4 * setup.replicas
        """Blocks: it does not matter then that the pool spreads each over several replicas."""
        self._trained_until = self._in_batch = 0.0
        self._blocks: list[tuple[bool, int]] = []
        """(replayed, pairs) of this iteration's, in the order of training."""

    def run(self) -> Outcome:
        setup = self._setup
        num_blocks = len(self._sizes) * (2 * setup.iterations - 1)
        begun = self._driver.serve(0.0, num_blocks * self._costs.driver_begin)
        joined = self._pool.serve(0.0, setup.replicas * self._pool_costs.join)
        self._clock.at(max(begun, joined), self._release)
        self._clock.at(1.0, self._second)
        self._clock.run()
        self._outcome.busy_s = self._busy()
        self._outcome.longest_wait_s = {
            **{name: process.longest_wait_s for name, process in self._named().items()},
            "play process": max(process.longest_wait_s for process in self._players),
        }
        return self._outcome

    def _named(self) -> dict[str, Process]:
        return {"pool": self._pool, "driver": self._driver, "coordinator": self._coordinator}

    def _busy(self) -> dict[str, float]:
        own = {name: process.busy_s for name, process in self._named().items()}
        return {**own, "play process": sum(process.busy_s for process in self._players)}

    def _second(self) -> None:
        """What goes on whatever happens."""
        now, setup, costs = self._clock.now, self._setup, self._costs
        beats = self._pool_costs.heartbeats(min(self._at_replicas, setup.replicas), setup.replicas) / HEARTBEAT_S
        self._pool.serve(now, self._pool_costs.idle + beats)
        for player in self._players:
            player.serve(now, costs.play_idle)
        self._driver.serve(now, costs.driver_idle + costs.driver_waiting * setup.in_flight)
        self._coordinator.serve(now, costs.coordinator_idle + POLLS_PER_S * costs.coordinator_poll)
        self._clock.at(now + 1.0, self._second)

    def _release(self) -> None:
        """The next iteration's blocks begin: as many as are in flight."""
        self._iteration += 1
        if self._iteration:
            self._outcome.iteration_s.append(self._clock.now - self._released)
        if self._iteration == self._setup.iterations:
            self._outcome.ended_s = self._clock.now
            return self._clock.stop()
        new, replayed = [(False, size) for size in self._sizes], [(True, size) for size in self._sizes]
        self._blocks = [*replayed, *new] if self._iteration else new
        self._begun = self._handed_on = self._delivered = 0
        self._finished: set[int] = set()
        self._released, self._before = self._clock.now, self._busy()
        for _ in range(min(self._setup.in_flight, len(self._blocks))):
            self._begin()

    def _begin(self) -> None:
        if self._begun < len(self._blocks):
            self._begun += 1
            place = self._begun - 1
            self._then(self._player(place).serve(self._clock.now, self._play_cost(place) / 2), self._ask, place)

    def _ask(self, place: int) -> None:
        self._then(self._pool.serve(self._clock.now, self._pool_cost(place) / 2), self._play, place)

    def _play(self, place: int) -> None:
        replayed, size = self._blocks[place]
        self._at_replicas += 1
        each_s = 2 / self._setup.scored_per_s if replayed else 1 / self._setup.drawn_per_s
        pieces = [size] if self._plenty else [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
        self._then(max(self._replicas.serve(self._clock.now, prompts * each_s) for prompts in pieces), self._answered, place)

    def _answered(self, place: int) -> None:
        self._at_replicas -= 1
        self._then(self._pool.serve(self._clock.now, self._pool_cost(place) / 2), self._write, place)

    def _write(self, place: int) -> None:
        self._then(self._player(place).serve(self._clock.now, self._play_cost(place) / 2), self._written, place)

    def _written(self, place: int) -> None:
        seconds = self._costs.driver_block + self._costs.driver_block_waiting * self._setup.in_flight
        self._then(self._driver.serve(self._clock.now, seconds), self._done, place)

    def _done(self, place: int) -> None:
        """The driver has got it: its slot is free, and it is handed on behind those before it."""
        self._begin()
        self._finished.add(place)
        while self._handed_on in self._finished:
            self._finished.remove(self._handed_on)
            self._hand_on(self._blocks[self._handed_on][1])
            self._handed_on += 1

    def _hand_on(self, size: int) -> None:
        now, workers, costs = self._clock.now, self._setup.workers, self._costs
        self._driver.serve(now, workers * costs.driver_read)
        self._then(
            self._coordinator.serve(now, costs.coordinator_block + workers * costs.coordinator_read), self._train_on, size
        )

    def _train_on(self, size: int) -> None:
        """A block of the first epoch has reached all ranks."""
        now, rate = self._clock.now, self._setup.trained_per_s
        self._delivered += 1
        begin = max(now, self._trained_until)
        self._outcome.waited_s += begin - self._trained_until
        self._trained_until = begin + size / rate
        self._in_batch += size
        while self._in_batch >= self._setup.batch_pairs:
            self._in_batch -= self._setup.batch_pairs
            self._then(self._trained_until - self._in_batch / rate, self._report, self._setup.batch_pairs)
        if self._delivered == len(self._blocks):
            self._played()

    def _played(self) -> None:
        self._outcome.played_s.append(self._clock.now - self._released)
        for name, busy in self._busy().items():
            before = self._outcome.busy_playing_s.get(name, 0.0)
            self._outcome.busy_playing_s[name] = before + busy - self._before[name]
        pairs, rest, self._in_batch = sum(size for _, size in self._blocks), self._in_batch, 0.0
        if rest:  # the last batch of an epoch may be smaller
            self._then(self._trained_until, self._report, rest)
        self._then(self._trained_until, self._step, pairs * (self._setup.epochs - 1))

    def _report(self, pairs: float) -> float:
        """A step is done; returns when its report has arrived."""
        self._outcome.pairs_trained += pairs
        arrived = self._coordinator.serve(self._clock.now, self._costs.coordinator_report)
        self._driver.serve(self._clock.now, self._costs.driver_report)
        return arrived

    def _step(self, left: float) -> None:
        """Later epochs: a step begins when the report before it has arrived."""
        if left <= 0:
            return self._end_of_training()
        now, pairs = self._clock.now, min(self._setup.batch_pairs, left)
        self._then(now + pairs / self._setup.trained_per_s, self._stepped, left - pairs, pairs)

    def _stepped(self, left: float, pairs: float) -> None:
        self._then(max(self._clock.now, self._report(pairs)), self._step, left)

    def _end_of_training(self) -> None:
        """The border: commands, weights into every replica, what the replicas did is told, the next iteration is released."""
        now, setup = self._clock.now, self._setup
        self._trained_until = now
        commands = 4  # train, publish, score, save
        posted = self._coordinator.serve(now, commands * setup.workers * self._costs.coordinator_command)
        self._then(posted, self._load)

    def _load(self) -> None:
        self._then(self._pool.serve(self._clock.now, self._setup.replicas * self._pool_costs.load) + self._setup.load_s, self._tell)

    def _tell(self) -> None:
        spans = self._setup.replicas + sum(-(-size // CHUNK) * (2 if replayed else 1) for replayed, size in self._blocks)
        told = self._pool.serve(self._clock.now, spans * self._pool_costs.span)
        self._then(max(told, self._driver.serve(told, spans * self._costs.driver_span)), self._release)

    def _player(self, place: int) -> Process:
        return self._players[place % len(self._players)]

    def _play_cost(self, place: int) -> float:
        return self._costs.play_block + self._blocks[place][1] * self._costs.play_prompt

    def _pool_cost(self, place: int) -> float:
        """All that the pool has to do for a block: a replayed one asks twice, a new one for log-probs of y only where replay has none."""
        replayed, size = self._blocks[place]
        verbs = ("score", "score") if replayed else ("sample",) if self._iteration else ("play",)
        return sum(self._pool_costs.asked(verb, size, self._setup.replicas) for verb in verbs)

    def _then(self, when: float, *what: object) -> None:
        self._clock.at(when, *what)
