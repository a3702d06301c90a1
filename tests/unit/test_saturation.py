"""The simulated day of `bench saturation`, beside queues that can be worked out by hand."""

import json
import random
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.bench import saturation
from spin_ray.bench.costs import CHUNK, Costs, LoopCosts, PoolCosts, slope
from spin_ray.bench.day import BLOCKS_PER_PROCESS, HEARTBEAT_S, Day, Setup
from spin_ray.bench.queues import Clock, Process, Servers
from spin_ray.errors import BadInput
from spin_ray.placement import play_processes

SECONDS = st.floats(0.01, 10)


def test_work_waits_for_the_work_before_it():
    process = Process()
    assert [process.serve(now, 2.0) for now in (0.0, 1.0, 1.5, 10.0)] == [2.0, 4.0, 6.0, 12.0]
    assert (process.busy_s, process.served) == (8.0, 4)
    assert process.waited_s == (2 - 1) + (4 - 1.5) and process.longest_wait_s == 2.5


@settings(deadline=None)
@given(SECONDS, SECONDS, st.integers(1, 60))
def test_a_queue_with_even_arrivals_and_even_work_grows_as_it_must(every_s, work_s, count):
    """D/D/1: the k-th arrival waits k (work - interval), and nothing if the work is shorter."""
    process = Process()
    done = [process.serve(k * every_s, work_s) for k in range(count)]
    waits = [max(0.0, k * (work_s - every_s)) for k in range(count)]
    assert done == pytest.approx([k * every_s + wait + work_s for k, wait in enumerate(waits)])
    assert process.waited_s == pytest.approx(sum(waits), abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_random_arrivals_wait_as_long_as_the_formula_says(share):
    """M/D/1: the mean wait is share / (2 (1 - share)) of the work (Pollaczek and Khinchine)."""
    rng, process, now, count = random.Random(0), Process(), 0.0, 200_000
    for _ in range(count):
        now += rng.expovariate(share)
        process.serve(now, 1.0)
    assert process.waited_s / count == pytest.approx(share / (2 * (1 - share)), rel=0.05)
    assert process.busy_s / now == pytest.approx(share, rel=0.02)


def test_whoever_is_free_first_serves():
    servers = Servers(2)
    assert [servers.serve(0.0, seconds) for seconds in (3.0, 1.0, 1.0, 1.0)] == [3.0, 1.0, 2.0, 3.0]
    assert servers.serve(10.0, 1.0) == 11.0


def test_events_come_in_order_of_time_and_then_of_asking():
    clock, seen = Clock(), []
    for when, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        clock.at(when, seen.append, name)
    clock.at(1.5, lambda: clock.at(1.75, seen.append, "new"))
    clock.run()
    assert seen == ["a", "b", "new", "c"] and clock.now == 2.0


SETUP = Setup(replicas=2, workers=3, prompts=8 * CHUNK, drawn_per_s=CHUNK / 10, scored_per_s=CHUNK, trained_per_s=1.0, batch_pairs=CHUNK,
              block_prompts=CHUNK, room=CHUNK, load_s=7.0)
"""Eight blocks; a replica plays one in 10 s and scores the two answers of its pairs in 2 s; a pair is trained on in 1 s, a block in 16."""


def test_a_control_plane_that_takes_no_time():
    ideal = Day(SETUP, Costs()).run()
    assert ideal.played_s == [40.0, 8 + 40.0]  # eight blocks by two replicas; from iteration 1 on as many replayed ones before them
    assert ideal.iteration_s == [10 + 2 * 128 + 7.0, 2 + 2 * 256 + 7.0]  # the first block, two epochs, the load
    assert ideal.busy_s == dict.fromkeys(ideal.busy_s, 0.0) and ideal.pairs_trained == 2 * 128 + 2 * 256
    assert ideal.waited_s == 10 + 7 + 2


def test_each_process_is_busy_for_what_comes_to_it():
    blocks, reports = 8 + 16, 2 * 8 + 2 * 16
    costs = Costs(
        PoolCosts(request=0.001, chunk=0.002, chunk_replica=0.0005, play=1e-4, sample=2e-4, score=3e-4, load=0.01, join=0.02, span=1e-5),
        LoopCosts(play_block=0.003, play_prompt=1e-4, driver_block=0.004, driver_block_waiting=0.001, driver_begin=0.005, driver_read=1e-3,
                  driver_report=0.002, driver_span=1e-4, coordinator_block=0.001, coordinator_read=0.002, coordinator_command=0.003,
                  coordinator_report=0.004),
    )
    busy, spans = Day(SETUP, costs).run().busy_s, (2 + 8) + (2 + 8 + 16)
    asked = 8 * 4 * (0.001 + 0.002 + 2 * 0.0005) + CHUNK * 8 * (1e-4 + 2e-4 + 2 * 3e-4)  # play, sample, and score twice
    assert busy["pool"] == pytest.approx(asked + 2 * 0.02 + 2 * 2 * 0.01 + spans * 1e-5)
    assert busy["play process"] == pytest.approx(blocks * (0.003 + CHUNK * 1e-4))
    assert SETUP.in_flight == 5
    assert busy["driver"] == pytest.approx(blocks * (0.004 + 5 * 0.001 + 3 * 1e-3 + 0.005) + reports * 0.002 + spans * 1e-4)
    assert busy["coordinator"] == pytest.approx(blocks * (0.001 + 3 * 0.002) + 2 * 4 * 3 * 0.003 + reports * 0.004)


def test_heartbeats_of_busy_replicas_and_what_is_never_idle():
    costs = Costs(PoolCosts(heartbeat=0.01, heartbeat_replica=0.001, idle=0.1), LoopCosts(driver_idle=0.02, driver_waiting=0.001, coordinator_poll=0.003, coordinator_idle=0.004, play_idle=0.5))
    day = Day(SETUP, costs).run()
    seconds, busy = int(day.ended_s), day.busy_s
    beats = busy["pool"] - 0.1 * seconds
    per_second = 2 * (0.01 + 2 * 0.001) / HEARTBEAT_S  # both replicas are at work for as long as something is played
    assert beats == pytest.approx(per_second * sum(day.played_s), abs=4 * per_second)
    assert busy["driver"] == pytest.approx(seconds * (0.02 + 5 * 0.001)) and busy["play process"] == pytest.approx(0.5 * seconds)
    assert busy["coordinator"] == pytest.approx(seconds * (0.004 + 5 * 0.003))


@pytest.mark.parametrize(("part", "name"), [
    ("pool", "request"), ("pool", "score"), ("loop", "driver_block"), ("loop", "play_block"), ("loop", "coordinator_read"),
])
def test_twice_the_cost_is_twice_the_work(part, name):
    once, twice = (
        saturation.compare(SETUP, Day(SETUP, Costs()).run(), Day(SETUP, replace(Costs(), **{part: replace(getattr(Costs(), part), **{name: cost})})).run())
        for cost in (0.01, 0.02)
    )
    process = "pool" if part == "pool" else {"driver_block": "driver", "play_block": "play process", "coordinator_read": "coordinator"}[name]
    assert once["load"][process] > 0
    assert twice["load"][process] == pytest.approx(2 * once["load"][process], abs=2e-4)


@pytest.mark.parametrize(("process", "costs"), [
    ("pool", Costs(pool=PoolCosts(request=8.0))),
    ("driver", Costs(loop=LoopCosts(driver_block=8.0))),
    ("coordinator", Costs(loop=LoopCosts(coordinator_read=8.0 / 3))),
    ("play process", Costs(loop=LoopCosts(play_block=8.0))),
])
def test_a_process_with_more_work_than_time_is_named(process, costs):
    """Two replicas finish a block every five seconds, and every block keeps the process busy for eight."""
    row = saturation.compare(SETUP, Day(SETUP, Costs()).run(), Day(SETUP, costs).run())
    assert row["saturated"] == [process] and row["load"][process] > 1 and row["play_takes"] > 1.3


def test_a_border_that_takes_long_costs_the_day_without_a_full_process():
    row = saturation.compare(SETUP, Day(SETUP, Costs()).run(), Day(SETUP, Costs(PoolCosts(load=50.0))).run())
    assert row["saturated"] == ["the day"] and row["lost"] == pytest.approx(100 / (521 + 100), rel=0.1)


def test_the_sizes_are_the_papers_hours():
    for replicas, workers in ((8, 1), (512, 64)):
        more, fewer = (way(replicas, workers, 1.0) for way in (saturation.more_work, saturation.fewer_hours))
        assert more.prompts == 50_000 * replicas // 8 and fewer.prompts == 50_000
        assert more.prompts / (replicas * more.drawn_per_s) == pytest.approx(1.45 * 3600, rel=0.03)
        assert 4 * more.prompts / more.trained_per_s == pytest.approx(8.64 * 3600)
        assert 4 * fewer.prompts / fewer.trained_per_s == pytest.approx(8.64 * 3600 * 8 / replicas)
        assert more.prompts / more.batch_pairs == 50_000 / 64 and fewer.batch_pairs == 64
        assert more.drawn_per_s == fewer.drawn_per_s


def test_only_the_first_saturated_size_is_simulated():
    rows = ({"saturated": full} for full in ([], ["pool"], ["pool", "driver"]))
    assert list(saturation._until_full(rows)) == [{"saturated": []}, {"saturated": ["pool"]}]


def test_costs_come_back_from_a_file(tmp_path):
    costs, file = Costs(PoolCosts(request=1.0), LoopCosts(rank_pair=2.0)), tmp_path / "costs.json"
    file.write_text(json.dumps(asdict(costs)))
    assert saturation.read_costs(file) == costs
    for damaged in ("{", '{"pool": {}}', '{"pool": {"unknown": 1}, "loop": {}}'):
        file.write_text(damaged)
        with pytest.raises(BadInput, match="remove it to measure them again"):
            saturation.read_costs(file)


def test_the_command_simulates_from_a_file_of_costs(tmp_path, capsys):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(asdict(Costs(PoolCosts(load=60.0), LoopCosts(rank_pair=1e-5)))))
    assert saturation.main(["--costs", str(file), "--sizes", "8x1", "64x8"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["saturated"] == {"more work": "64x8", "fewer hours": "64x8"}
    for size in ("512", "0x3", "axb"):
        with pytest.raises(SystemExit):
            saturation.main(["--sizes", size])


def test_a_line_through_two_points_never_falls():
    assert slope((1, 3.0), (5, 11.0)) == 2.0 and slope((1, 3.0), (5, 2.0)) == 0.0


def test_what_the_simulation_takes_from_the_system_is_what_is_there():
    from spin_ray.learner.group import POLL_S
    from spin_ray.sampler import pool

    assert (pool.CHUNK, pool.HEARTBEAT_S) == (CHUNK, HEARTBEAT_S)
    assert 1 / POLL_S == 5
    for replicas in (1, 64, 512, 4096):
        setup = Setup(replicas, 1, 100, 1.0, 1.0, 1.0)
        assert setup.play_processes == play_processes(setup.in_flight)
    assert BLOCKS_PER_PROCESS == 256
