"""Which devices a plan is for, and what of them it asks for, without a cluster."""

import pytest

from spin_ray.config import load_config
from spin_ray.look.plan.inputs import Asked
from spin_ray.look.plan.machine import hardware_of, machine_of

CPU = pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="what is tried where no GPU is")
NOTHING = Asked()


def planned(tmp_path, *words, asked=NOTHING):
    (tmp_path / "c.yaml").write_text("model: {path: demo:sft}\ndata: {train: demo:train}\n")
    config = load_config(tmp_path / "c.yaml", words)[0]
    machine = machine_of(config, asked)
    return machine, hardware_of(config, machine)


@CPU
def test_without_a_gpu_and_without_a_word_of_one_the_players_are_on_cpus(tmp_path):
    machine, hardware = planned(tmp_path)
    assert (machine.num_gpus, hardware.device, hardware.dtype) == (0, "cpu", "float32") and len(machine.memories) == 1


@CPU
@pytest.mark.parametrize(("words", "asked", "sizes"), [
    (("learner.gpus_per_worker=1", "sampler.gpus_per_replica=1"), NOTHING, [24, 40, 80]),
    ((), Asked(gpu_memory_gib=48), [48]),
])
def test_gpus_that_are_not_here(tmp_path, words, asked, sizes):
    machine, hardware = planned(tmp_path, *words, asked=asked)
    assert [memory / 2**30 for memory in machine.memories] == sizes
    assert (machine.num_gpus, hardware.device, hardware.dtype, hardware.takes_turns) == (2, "cuda", "bfloat16", False)


def test_players_that_take_turns(tmp_path):
    _, hardware = planned(tmp_path, "placement.mode=shared", asked=Asked(gpu_memory_gib=24))
    assert hardware.takes_turns and hardware.sampler_gpus + hardware.learner_gpus == pytest.approx(1)


@pytest.mark.parametrize(("ours", "theirs"), [("a100", "h100"), ("in(a100,l4)", "!a100"), ("!in(a,b)", "a")])
def test_nodes_with_whatever_labels_are_asked_for(tmp_path, ours, theirs):
    words = (f"sampler.label_selector={{pool: '{ours}'}}", f"learner.label_selector={{pool: '{theirs}'}}")
    _, hardware = planned(tmp_path, *words, asked=Asked(gpu_memory_gib=24))
    assert [kind.selector for kind in hardware.actors[:2]] == [{"pool": ours}, {"pool": theirs}]


def test_where_nothing_is_played_no_replica_is_asked_for(tmp_path):
    _, hardware = planned(tmp_path, "method=sft")
    assert [kind.number for kind in hardware.actors if kind.who == "sampler"] == [0]
