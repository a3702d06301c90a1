"""What runs where, decided from the cluster's resources alone."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_ray.config import Config, DataConfig, LearnerConfig, ModelConfig, OverlapConfig, PlacementConfig, SamplerConfig, WeightsConfig
from spin_ray.errors import BadInput
from spin_ray.nodes import DoNotFit, Node
from spin_ray.placement import choose_hardware, learner_goes_first, play_processes


def config(**parts) -> Config:
    return dataclasses.replace(Config(), **parts)


def test_cpu_machine():
    hardware = choose_hardware(config(), [Node("here", {"CPU": 2})])
    assert (hardware.device, hardware.dtype, hardware.torch_backend) == ("cpu", "float32", "gloo")
    assert (hardware.sampler_gpus, hardware.learner_gpus, hardware.blocks_in_flight) == (0, 0, 9)
    assert hardware.learner_env == {"DS_ACCELERATOR": "cpu"}


def test_gpu_cluster():
    hardware = choose_hardware(config(sampler=SamplerConfig(tensor_parallel_size=2)), [Node("here", {"CPU": 64, "GPU": 3})])
    assert (hardware.device, hardware.dtype, hardware.torch_backend) == ("cuda", "bfloat16", "nccl")
    assert (hardware.sampler_gpus, hardware.learner_gpus) == (2, 1)
    assert "enforce_eager" not in hardware.engine and hardware.learner_env == {}


def test_too_many_actors_are_named_with_the_sum():
    with pytest.raises(BadInput, match=r"2 CPU, this run needs 4\.6 = 8 samplers × 0\.5 \+ 1 learner × 0\.5 \+ 1 play process × 0\.1"):
        choose_hardware(config(sampler=SamplerConfig(num_replicas=8)), [Node("here", {"CPU": 2})])
    with pytest.raises(BadInput, match="4 GPU, this run needs 5 = 1 sampler × 1 \\+ 4 learners × 1; here has 4 GPU, 64 CPU; lower"):
        choose_hardware(config(learner=LearnerConfig(num_workers=4)), [Node("here", {"CPU": 64, "GPU": 4})])


def test_only_the_players_of_the_command_count():
    large = config(sampler=SamplerConfig(num_replicas=100))
    assert choose_hardware(large, [Node("here", {"CPU": 2})], samplers=False).device == "cpu"
    choose_hardware(config(learner=LearnerConfig(num_workers=64)), [Node("here", {"CPU": 2})], learner=False)


def test_gpus_of_a_replica_must_be_those_that_share_its_model():
    with pytest.raises(BadInput, match=r"gpus_per_replica=1 does not go with sampler.tensor_parallel_size=2"):
        choose_hardware(config(sampler=SamplerConfig(tensor_parallel_size=2, gpus_per_replica=1)), [Node("here", {"CPU": 64, "GPU": 8})])


def test_learner_on_the_cpu_of_a_gpu_cluster():
    hardware = choose_hardware(config(learner=LearnerConfig(gpus_per_worker=0)), [Node("here", {"CPU": 64, "GPU": 8})])
    assert (hardware.device, hardware.dtype, hardware.torch_backend) == ("cpu", "float32", "gloo")


def test_dtype_can_be_asked_for():
    assert choose_hardware(config(model=ModelConfig(dtype="bfloat16")), [Node("here", {"CPU": 2})]).audit_tolerance == 0.05


def test_a_process_of_the_play_pipeline_holds_many_blocks():
    sampler = SamplerConfig(num_replicas=64, cpus_per_replica=0.1, max_num_seqs=256, block_prompts=64)
    assert choose_hardware(config(sampler=sampler), [Node("here", {"CPU": 8})]).blocks_in_flight == 513
    assert [play_processes(number) for number in (1, 256, 257, 513)] == [1, 1, 2, 3]


def test_the_learner_goes_first_on_a_cpu_where_nothing_else_needs_its_time():
    def first(num_gpus=0, learner=True, **parts):
        return learner_goes_first(config(**parts), num_gpus=num_gpus, samplers=True, learner=learner)

    assert first()
    assert not first(num_gpus=1)
    assert not first(learner=False)
    assert not first(data=DataConfig(eval="demo:heldout"))
    assert not first(overlap=OverlapConfig(mode="sequential"))


def test_one_gpu_is_shared():
    hardware = choose_hardware(config(), [Node("here", {"CPU": 8, "GPU": 1})])
    assert hardware.takes_turns and (hardware.device, hardware.dtype) == ("cuda", "bfloat16")
    assert hardware.sampler_gpus + hardware.learner_gpus == 1 and 2 * min(hardware.sampler_gpus, hardware.learner_gpus) > 0.5
    assert hardware.engine == {"gpu_memory_utilization": None, "enable_sleep_mode": True}
    for alone in ({"samplers": False}, {"learner": False}):
        assert not choose_hardware(config(), [Node("here", {"CPU": 8, "GPU": 1})], **alone).takes_turns
    assert not choose_hardware(config(learner=LearnerConfig(gpus_per_worker=0)), [Node("here", {"CPU": 8, "GPU": 1})]).takes_turns
    with pytest.raises(BadInput, match="1 GPU, this run needs 2 = 1 sampler × 1 \\+ 1 learner × 1"):
        choose_hardware(config(placement=PlacementConfig("separate")), [Node("here", {"CPU": 8, "GPU": 1})])


def test_more_gpus_are_shared_where_that_is_asked_for():
    shared = {"placement": PlacementConfig("shared")}
    assert not choose_hardware(config(), [Node("here", {"CPU": 8, "GPU": 2})]).takes_turns
    four = config(**shared, sampler=SamplerConfig(num_replicas=4), learner=LearnerConfig(num_workers=4))
    assert choose_hardware(four, [Node("here", {"CPU": 8, "GPU": 4})]).takes_turns
    with pytest.raises(BadInput, match="2 GPU, this run needs 4 = 4 samplers × 1"):
        choose_hardware(four, [Node("here", {"CPU": 8, "GPU": 2})])
    with pytest.raises(BadInput, match=r"placement.mode=shared does not go with 2 GPUs for a sampler and 1 for a learner's worker"):
        choose_hardware(config(**shared, sampler=SamplerConfig(tensor_parallel_size=2)), [Node("here", {"CPU": 8, "GPU": 4})])


def test_on_a_cpu_players_take_turns_if_asked():
    assert not choose_hardware(config(), [Node("here", {"CPU": 2})]).takes_turns
    hardware = choose_hardware(config(placement=PlacementConfig("shared")), [Node("here", {"CPU": 2})])
    assert hardware.takes_turns and (hardware.sampler_gpus, hardware.learner_gpus, hardware.device) == (0, 0, "cpu")
    assert hardware.engine == {"enforce_eager": True}


def hosts(*gpus, labels=()):
    return [Node(f"10.0.0.{k}", {"GPU": number, "CPU": 32}, dict([labels[k]] if labels else [])) for k, number in enumerate(gpus)]


def test_the_gpus_of_a_replica_are_on_one_node():
    wide = config(sampler=SamplerConfig(tensor_parallel_size=4))
    choose_hardware(wide, hosts(4, 1))
    with pytest.raises(BadInput, match=r"1 of 1 sampler fit on no node: each needs 4 GPU, 0.5 CPU on one; 10.0.0.0 has 3 GPU, 32 CPU; 10.0.0.1"):
        choose_hardware(wide, hosts(3, 3))
    two = config(sampler=SamplerConfig(num_replicas=2, tensor_parallel_size=4), learner=LearnerConfig(num_workers=4))
    choose_hardware(two, hosts(6, 6))  # two workers beside each replica
    with pytest.raises(BadInput, match="1 of 2 samplers fit on no node"):
        choose_hardware(two, hosts(6, 3, 3))


def test_players_go_where_their_labels_say():
    pools = [("pool", "samplers"), ("pool", "learners"), ("pool", "learners")]
    placed = config(
        sampler=SamplerConfig(num_replicas=8, label_selector={"pool": "samplers"}),
        learner=LearnerConfig(num_workers=16, label_selector={"pool": "!samplers"}),
    )
    choose_hardware(placed, hosts(8, 8, 8, labels=pools))
    with pytest.raises(BadInput, match=r"8 of 16 learners fit on no node with pool=!samplers: .*10.0.0.0 has 16 GPU, 32 CPU, pool=samplers"):
        choose_hardware(placed, hosts(16, 8, labels=pools))
    with pytest.raises(BadInput, match=r"no node of the cluster has the labels of the sampler: pool=h100 \(1 sampler, each needs 1 GPU, 0.5 CPU on one\); 10.0.0.0 has 8 GPU"):
        choose_hardware(config(sampler=SamplerConfig(label_selector={"pool": "h100"})), hosts(8, 8, labels=pools))


def test_who_may_be_anywhere_leaves_room_for_who_may_not():
    pools = [("pool", "a"), ("pool", "b")]
    for picky, other in (("sampler", "learner"), ("learner", "sampler")):
        number = {"sampler": "num_replicas", "learner": "num_workers"}
        kinds = {"sampler": SamplerConfig, "learner": LearnerConfig}
        parts = {picky: kinds[picky](**{number[picky]: 4}, label_selector={"pool": "a"}), other: kinds[other](**{number[other]: 4})}
        choose_hardware(config(**parts), hosts(4, 4, labels=pools))


def test_a_transport_wants_its_devices():
    nccl, gloo = ({"weights": WeightsConfig(name)} for name in ("nccl", "gloo"))
    cpus, one, two = ([Node("here", {"CPU": 8, **gpus})] for gpus in ({}, {"GPU": 1}, {"GPU": 2}))
    choose_hardware(config(**nccl), two)
    choose_hardware(config(**gloo), cpus)
    choose_hardware(config(**nccl), cpus, learner=False)  # `eval`: nothing is sent
    with pytest.raises(BadInput, match=r"nccl wants both players on GPUs, and here a sampler has 0 GPUs, a learner's worker 0; set weights\."):
        choose_hardware(config(**nccl), cpus)
    with pytest.raises(BadInput, match="nccl wants both players on GPUs, and here a sampler has 1 GPUs, a learner's worker 0"):
        choose_hardware(config(**nccl, learner=LearnerConfig(gpus_per_worker=0)), two)
    with pytest.raises(BadInput, match="gloo wants both players on CPUs"):
        choose_hardware(config(**gloo), two)
    with pytest.raises(BadInput, match="nccl does not go with players that take turns on the same devices"):
        choose_hardware(config(**nccl), one)


def test_shared_gpus_have_one_selector():
    with pytest.raises(BadInput, match=r"placement.mode=shared wants the same sampler.label_selector and learner.label_selector"):
        choose_hardware(
            config(placement=PlacementConfig("shared"), learner=LearnerConfig(label_selector={"pool": "a"})), hosts(1, labels=[("pool", "a")])
        )


@pytest.mark.parametrize(("wanted", "meant"), [
    ("a100", {"a100"}), ("!a100", {"h100", None}), ("in(a100, h100)", {"a100", "h100"}), ("!in(a100,h100)", {None}),
])
def test_selectors_mean_what_they_mean_to_ray(wanted, meant):
    nodes = {value: Node("x", {}, {"gpu": value} if value else {}) for value in ("a100", "h100", None)}
    assert {value for value, node in nodes.items() if node.is_meant({"gpu": wanted})} == meant


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 6))
def test_what_fits_somehow_is_not_refused(gpus, replicas, wide, workers):
    """Against trying every way to spread the replicas over the nodes; what is left takes workers of one GPU each."""
    ways = itertools.product(*(range(number // wide + 1) for number in gpus))
    possible = any(sum(way) >= replicas for way in ways) and sum(gpus) >= replicas * wide + workers
    placed = config(
        sampler=SamplerConfig(num_replicas=replicas, tensor_parallel_size=wide), learner=LearnerConfig(num_workers=workers),
        placement=PlacementConfig("separate"),
    )
    try:
        choose_hardware(placed, hosts(*gpus))
    except BadInput:
        assert not possible or not any(gpus)
    else:
        assert possible or not any(gpus)


def test_where_nodes_may_still_come_nothing_is_too_small():
    many = config(sampler=SamplerConfig(num_replicas=8, gpus_per_replica=1), learner=LearnerConfig(gpus_per_worker=1))
    hardware = choose_hardware(many, hosts(0), may_grow=True)
    assert hardware.device == "cuda" and not hardware.takes_turns
    assert [(kind.who, kind.number) for kind in hardware.actors][:2] == [("sampler", 8), ("learner", 1)]
    with pytest.raises(DoNotFit, match="0 GPU, this run needs 9 = 8 samplers × 1"):
        choose_hardware(many, hosts(0))


def test_players_do_not_land_on_cpus_because_the_gpus_are_not_there_yet():
    with pytest.raises(BadInput, match="the cluster has no GPU yet, and nodes may still come: say whether"):
        choose_hardware(config(), hosts(0), may_grow=True)
    on_cpus = config(sampler=SamplerConfig(gpus_per_replica=0), learner=LearnerConfig(gpus_per_worker=0))
    assert choose_hardware(on_cpus, hosts(0), may_grow=True).device == "cpu"
    assert choose_hardware(config(), hosts(1), may_grow=True).takes_turns is False  # the second GPU may still come


def test_room_is_asked_for_the_fewest_replicas_and_blocks_for_the_most():
    between = choose_hardware(config(sampler=SamplerConfig(num_replicas={"min": 2, "max": 8})), hosts(4))
    assert between.actors[0].number == 2
    assert between.blocks_in_flight == choose_hardware(config(sampler=SamplerConfig(num_replicas=8)), hosts(9)).blocks_in_flight
