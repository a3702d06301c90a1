"""What runs where, decided from the cluster's resources alone."""

import dataclasses

import pytest

from spin_ray.config import Config, DataConfig, LearnerConfig, ModelConfig, OverlapConfig, PlacementConfig, SamplerConfig
from spin_ray.errors import BadInput
from spin_ray.placement import choose_hardware, learner_goes_first, play_processes


def config(**parts) -> Config:
    return dataclasses.replace(Config(), **parts)


def test_cpu_machine():
    hardware = choose_hardware(config(), {"CPU": 2})
    assert (hardware.device, hardware.dtype, hardware.torch_backend) == ("cpu", "float32", "gloo")
    assert (hardware.sampler_gpus, hardware.learner_gpus, hardware.blocks_in_flight) == (0, 0, 9)
    assert hardware.learner_env == {"DS_ACCELERATOR": "cpu"}


def test_gpu_cluster():
    hardware = choose_hardware(config(sampler=SamplerConfig(tensor_parallel_size=2)), {"CPU": 64, "GPU": 3})
    assert (hardware.device, hardware.dtype, hardware.torch_backend) == ("cuda", "bfloat16", "nccl")
    assert (hardware.sampler_gpus, hardware.learner_gpus) == (2, 1)
    assert "enforce_eager" not in hardware.engine and hardware.learner_env == {}


def test_too_many_actors_are_named_with_the_sum():
    with pytest.raises(BadInput, match=r"2 CPU, this run needs 4\.6 = 8 samplers × 0\.5 \+ 1 learner × 0\.5 \+ 1 play process × 0\.1"):
        choose_hardware(config(sampler=SamplerConfig(num_replicas=8)), {"CPU": 2})
    with pytest.raises(BadInput, match="4 GPU, this run needs 5 = 1 sampler × 1 \\+ 4 learners × 1"):
        choose_hardware(config(learner=LearnerConfig(num_workers=4)), {"CPU": 64, "GPU": 4})


def test_only_the_players_of_the_command_count():
    large = config(sampler=SamplerConfig(num_replicas=100))
    assert choose_hardware(large, {"CPU": 2}, samplers=False).device == "cpu"
    choose_hardware(config(learner=LearnerConfig(num_workers=64)), {"CPU": 2}, learner=False)


def test_gpus_of_a_replica_must_be_those_that_share_its_model():
    with pytest.raises(BadInput, match=r"gpus_per_replica=1 does not go with sampler.tensor_parallel_size=2"):
        choose_hardware(config(sampler=SamplerConfig(tensor_parallel_size=2, gpus_per_replica=1)), {"CPU": 64, "GPU": 8})


def test_learner_on_the_cpu_of_a_gpu_cluster():
    hardware = choose_hardware(config(learner=LearnerConfig(gpus_per_worker=0)), {"CPU": 64, "GPU": 8})
    assert (hardware.device, hardware.dtype, hardware.torch_backend) == ("cpu", "float32", "gloo")


def test_dtype_can_be_asked_for():
    assert choose_hardware(config(model=ModelConfig(dtype="bfloat16")), {"CPU": 2}).audit_tolerance == 0.05


def test_a_process_of_the_play_pipeline_holds_many_blocks():
    sampler = SamplerConfig(num_replicas=64, cpus_per_replica=0.1, max_num_seqs=256, block_prompts=64)
    assert choose_hardware(config(sampler=sampler), {"CPU": 8}).blocks_in_flight == 513
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
    hardware = choose_hardware(config(), {"CPU": 8, "GPU": 1})
    assert hardware.takes_turns and (hardware.device, hardware.dtype) == ("cuda", "bfloat16")
    assert hardware.sampler_gpus + hardware.learner_gpus == 1 and 2 * min(hardware.sampler_gpus, hardware.learner_gpus) > 0.5
    assert hardware.engine == {"gpu_memory_utilization": None, "enable_sleep_mode": True}
    for alone in ({"samplers": False}, {"learner": False}):
        assert not choose_hardware(config(), {"CPU": 8, "GPU": 1}, **alone).takes_turns
    assert not choose_hardware(config(learner=LearnerConfig(gpus_per_worker=0)), {"CPU": 8, "GPU": 1}).takes_turns
    with pytest.raises(BadInput, match="1 GPU, this run needs 2 = 1 sampler × 1 \\+ 1 learner × 1"):
        choose_hardware(config(placement=PlacementConfig("separate")), {"CPU": 8, "GPU": 1})


def test_more_gpus_are_shared_where_that_is_asked_for():
    shared = {"placement": PlacementConfig("shared")}
    assert not choose_hardware(config(), {"CPU": 8, "GPU": 2}).takes_turns
    four = config(**shared, sampler=SamplerConfig(num_replicas=4), learner=LearnerConfig(num_workers=4))
    assert choose_hardware(four, {"CPU": 8, "GPU": 4}).takes_turns
    with pytest.raises(BadInput, match="2 GPU, this run needs 4 = 4 samplers × 1"):
        choose_hardware(four, {"CPU": 8, "GPU": 2})
    with pytest.raises(BadInput, match=r"placement.mode=shared does not go with 2 GPUs for a sampler and 1 for a learner's worker"):
        choose_hardware(config(**shared, sampler=SamplerConfig(tensor_parallel_size=2)), {"CPU": 8, "GPU": 4})


def test_on_a_cpu_players_take_turns_if_asked():
    assert not choose_hardware(config(), {"CPU": 2}).takes_turns
    hardware = choose_hardware(config(placement=PlacementConfig("shared")), {"CPU": 2})
    assert hardware.takes_turns and (hardware.sampler_gpus, hardware.learner_gpus, hardware.device) == (0, 0, "cpu")
    assert hardware.engine == {"enforce_eager": True}
