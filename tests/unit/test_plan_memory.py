"""The plan's arithmetic, by what must hold for any numbers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_ray.look.plan import memory
from spin_ray.look.plan.memory import learner_parts, moments
from spin_ray.look.plan.sizes import GIB, Layout, Model, Work
from spin_ray.look.plan.times import Job, Rate, Speeds, iterations

MILLION = 10**6
models = st.builds(
    lambda total, share, head: Model(total, int(total * share), largest=head, layer=total // 20, head=head, head_is_trained=share == 1),
    st.integers(MILLION, 10**11), st.sampled_from([1.0, 0.01]), st.integers(1000, MILLION),
)
layouts = st.builds(
    Layout, on_gpu=st.booleans(), weight_bytes=st.sampled_from([2, 4]), workers=st.integers(1, 64), zero_stage=st.integers(0, 3),
    optimizer=st.sampled_from(["rmsprop", "adamw", "adamw_8bit"]), copies=st.integers(0, 2), recompute=st.booleans(),
)
works = st.builds(
    lambda layers, number, logits, rows: Work(layers, layers / number, layers / 30, layers / 50, layers / number / 8, logits, rows),
    st.floats(1e6, 1e11), st.integers(2, 80), st.floats(0, GIB), st.sampled_from([1.0, 4.0]),
)
BASE = 0.6 * GIB


def peak(model, layout, work):
    return memory.total(learner_parts(model, layout, work, base=BASE))


@given(models, layouts, works)
def test_the_parts_are_the_peak_and_no_moment_is_above_it(model, layout, work):
    parts = learner_parts(model, layout, work, base=BASE)
    assert all(part.num_bytes >= 0 and part.name and part.formula for part in parts)
    found = [memory.total(moment) for moment in moments(model, layout, work).values()]
    beside = ("freed", "bitsandbytes")
    held = sum(part.num_bytes for part in parts if part.name.startswith(beside)) if not layout.on_gpu else -BASE
    assert memory.total(parts) == pytest.approx(BASE + max(found) + held)


@given(models, layouts, works)
def test_more_workers_never_raise_a_ranks_memory(model, layout, work):
    assert peak(model, replace(layout, workers=2 * layout.workers), work) <= peak(model, layout, work)


@given(models, layouts, works)
def test_what_saves_memory_does(model, layout, work):
    assert peak(model, replace(layout, recompute=True), work) <= peak(model, replace(layout, recompute=False), work) + 1
    assert peak(model, replace(layout, optimizer="rmsprop", copies=0), work) <= peak(model, replace(layout, optimizer="rmsprop", copies=1), work)
    on_gpu = replace(layout, on_gpu=True)  # on a CPU bitsandbytes' libraries may take more than it saves
    assert peak(model, replace(on_gpu, optimizer="adamw_8bit"), work) <= peak(model, replace(on_gpu, optimizer="adamw"), work)
    if layout.on_gpu:
        with_states = replace(layout, zero_stage=max(1, layout.zero_stage))
        assert peak(model, replace(with_states, offload=True), work) <= peak(model, with_states, work)


@given(models, layouts, works)
def test_an_adapter_allocates_less_than_all_weights_and_four_bits_less_than_that(model, layout, work):
    whole = replace(model, trained=model.total, head_is_trained=True)
    adapter = replace(model, trained=model.total // 100, head_is_trained=False)
    in_4_bits = replace(adapter, in_4_bits=model.total // 2, largest=0)
    sizes = [max(map(memory.total, moments(one, layout, work).values())) for one in (in_4_bits, adapter, whole)]
    assert sizes[0] < sizes[1] < sizes[2]


@given(models, layouts, works, st.floats(1.0, 10.0))
def test_more_tokens_take_more(model, layout, work, factor):
    more = replace(work, **{name: getattr(work, name) * factor for name in ("layers", "largest_layer", "layer_inputs", "around", "widest")})
    assert peak(model, layout, more) >= peak(model, layout, work)


@given(models, works, st.integers(2, 64))
def test_zero_3_cuts_what_lies_there_into_equal_parts(model, work, workers):
    alone, cut = ({p.name: p.num_bytes for p in learner_parts(model, Layout(True, 2, n, 3, "adamw"), work)} for n in (1, workers))
    for name in ("weights", "master weights, float32", "adamw's moments", "gradients, float32"):
        assert cut[name] == pytest.approx(alone[name] / workers)


def test_a_worked_number():
    """7.24B weights, bfloat16, ZeRO-3 over 4 with RMSprop: 7.24 × (2 + 4 + 4 + 4) / 4 = 25.3 GB, as conf/zephyr7b_8gpu.yaml says."""
    parts = {p.name: p.num_bytes for p in learner_parts(
        Model(7_240_000_000, 7_240_000_000), Layout(True, 2, 4, 3, "rmsprop"), Work(0, 0, 0, 0, 0, 0))}
    always = ("weights", "master weights, float32", "rmsprop's moments", "gradients, float32")
    assert sum(parts[name] for name in always) / 1e9 == pytest.approx(25.34, abs=0.01)


def speeds(learner=1000.0, sampler=500.0):
    return Speeds(Rate(learner, ""), Rate(sampler, ""), Rate(1e9, ""), Rate(2.0, ""))


JOB = Job(
    prompts=100, prompt=20, answer=11, generated=11, epochs=[2, 2, 2], replay=1, num_eval=0, replicas=1, overlap=True, plays=True,
    alone=False,    scorer="opponent",
)


def test_time_of_an_iteration():
    """100 pairs × 40 tokens × 2 epochs / 1,000 = 8 s of training; 100 × 11 / 500 = 2.2 s of play, hidden; 2 s of sync."""
    first, second, _ = iterations(JOB, speeds())
    assert (first.train_s, first.wall_s) == (pytest.approx(8), pytest.approx(10))
    assert first.play_s == pytest.approx(2.2, abs=1e-3)
    assert first.replicas_needed == pytest.approx(2.2 / 8, abs=1e-3)
    assert (second.pairs, second.train_s) == (200, pytest.approx(16))


@given(st.integers(1, 8), st.floats(10, 1e5), st.floats(10, 1e5))
def test_as_many_replicas_as_it_says_hide_play_and_one_fewer_does_not(replicas, learner, sampler):
    import math

    for one in iterations(replace(JOB, replicas=replicas), speeds(learner, sampler)):
        enough = math.ceil(one.replicas_needed - 1e-9)
        alone = one.play_s * replicas
        assert alone / enough <= one.train_s * (1 + 1e-6)
        assert enough == 1 or alone / (enough - 1) > one.train_s * (1 - 1e-6)


@given(st.integers(1, 8), st.floats(10, 1e5), st.floats(10, 1e5))
def test_taking_turns_takes_longer_than_overlapping(replicas, learner, sampler):
    job = replace(JOB, replicas=replicas)
    for together, turns in zip(iterations(job, speeds(learner, sampler)), iterations(replace(job, overlap=False), speeds(learner, sampler)), strict=True):
        assert turns.wall_s == pytest.approx(turns.train_s + turns.play_s + 2) and turns.wall_s >= together.wall_s
        assert turns.replicas_needed == 0
