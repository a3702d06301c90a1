"""The opponent's real vLLM engine on the CPU: its numbers are transformers' numbers, before and after a weight load."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.distributed import cleanup_dist_env_and_memory

from spin_ray.bench.samplers import in_own_process
from spin_ray.config import Config
from spin_ray.errors import EngineFailed, WrongVersion
from spin_ray.exchange.weights import from_bucket, to_bucket
from spin_ray.nodes import Node
from spin_ray.placement import choose_hardware
from spin_ray.records import SamplingSettings, Saved, Version
from spin_ray.sampler.engine import OpponentEngine

PROMPT = [3, 50, 60, 70, 1, 4]
GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, max_new_tokens=12, stop_ids=())
SAMPLED = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=24, stop_ids=tuple(range(1, 30)))


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """vLLM's engines of this process join one; a later test may want its own."""
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def opponent(request, tiny_model):
    """(engine at version 0, its model folder, tied?)"""
    hardware = choose_hardware(Config(), [Node("here", {"CPU": 2})])
    os.environ.update(hardware.sampler_env)
    folder = tiny_model(tied=request.param)
    engine = OpponentEngine(Saved(str(folder)), version=Version(0), dtype="float32", max_model_len=64, seed=0, settings=hardware.engine)
    yield engine, folder, request.param
    engine.close()


def transformers_logps(model, prompt, answer):
    ids = torch.tensor([[*prompt, *map(int, answer)]])
    with torch.no_grad():
        logps = torch.log_softmax(model(ids).logits[0].float(), -1)
    return logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def test_sampling_scoring_and_loading(opponent):
    engine, folder, tied = opponent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drawn = [future.result(60) for future in [engine.sample(Version(0), PROMPT, SAMPLED) for _ in range(40)]]
    assert len({tuple(c.token_ids) for c in drawn}) > 30
    for completion in drawn:
        expected = transformers_logps(model, PROMPT, completion.token_ids)
        np.testing.assert_allclose(completion.logps, expected, atol=1e-4)
        np.testing.assert_allclose(engine.score(Version(0), PROMPT, completion.token_ids).result(60), expected, atol=1e-4)
        stopped = completion.finish_reason == "stop"
        ends = [token in SAMPLED.stop_ids for token in completion.token_ids]
        assert sum(ends) == stopped == ends[-1] and (stopped or len(ends) == 24)
    assert {c.finish_reason for c in drawn} == {"stop", "length"}

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    bucket = to_bucket((name, parameter.detach()) for name, parameter in model.named_parameters())
    tied_names = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    assert engine.load(Version(1), lambda: from_bucket(bucket, tied_names)).result(60) == Version(1)
    answer = drawn[0].token_ids
    after = engine.score(Version(1), PROMPT, answer).result(60)
    np.testing.assert_allclose(after, transformers_logps(model, PROMPT, answer), atol=1e-4)
    assert np.abs(after - drawn[0].logps).mean() > 0.05  # the load did change the model

    # The way of a tensor-parallel engine, whose ranks read a file: back to the first weights.
    engine._several_processes = True
    first = to_bucket((name, p.detach()) for name, p in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    assert engine.load(Version(2), lambda: from_bucket(first, tied_names)).result(60) == Version(2)
    np.testing.assert_allclose(engine.score(Version(2), PROMPT, answer).result(60), drawn[0].logps, atol=1e-4)

    # invariant 4: never another version than asked for
    with pytest.raises(WrongVersion, match="asked for theta_0, this sampler holds theta_2"):
        engine.sample(Version(0), PROMPT, SAMPLED).result(60)
    with pytest.raises(ValueError, match="100 tokens leave no room"):
        engine.sample(Version(2), [3] * 100, SAMPLED).result(60)
    greedy = SamplingSettings(temperature=0.0, top_p=1.0, max_new_tokens=8, stop_ids=(1,))
    first, second = (engine.sample(Version(2), PROMPT, greedy).result(60) for _ in range(2))
    assert first.token_ids.tolist() == second.token_ids.tolist()


def test_the_heartbeat_sees_an_engine_that_hangs_and_none_in_one_that_waits(opponent, monkeypatch):
    engine, _, _ = opponent
    assert engine.stuck_s() == 0.0
    step, begun, goes_on = engine._engine.step, threading.Event(), threading.Event()

    def hangs():
        begun.set()
        goes_on.wait(300)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "step", hangs)
        asked = engine.sample(Version(2), PROMPT, SAMPLED)
        assert begun.wait(120)
        before = engine.stuck_s()
        time.sleep(0.5)
        assert engine.stuck_s() >= before + 0.5 and not asked.done()
        goes_on.set()
        asked.result(240)
    wait_until = time.monotonic() + 120
    while engine.stuck_s() and time.monotonic() < wait_until:
        time.sleep(0.01)
    assert engine.stuck_s() == 0.0


def test_broken_engine_fails_every_caller(opponent, monkeypatch):
    engine, _, _ = opponent

    def broken():
        raise RuntimeError("the engine core died")

    monkeypatch.setattr(engine._engine, "step", broken)
    waiting = [engine.sample(Version(2), PROMPT, SAMPLED), engine.score(Version(2), PROMPT, [5, 6])]
    for future in waiting:
        with pytest.raises(EngineFailed, match="RuntimeError: the engine core died"):
            future.result(60)
    with pytest.raises(EngineFailed, match="RuntimeError: the engine core died"):
        engine.sample(Version(2), PROMPT, SAMPLED).result(60)


@pytest.mark.parametrize(("family", "steps"), [
    ("glm4_moe", {"load": "exact", "reload": "exact", "again": "exact"}),  # experts, and a router's buffer
    ("gpt_oss", {"load": "exact", "reload": "refused: RuntimeError: vLLM cannot replace all weights of a GptOssForCausalLM: "
                                            "4 parts keep theirs, first model.layers.0.attn"}),
])
def test_a_mixture_s_weights_are_all_replaced_or_none(family, steps):
    """In a process of its own: vLLM makes the groups that experts need only with a process's first engine."""
    assert in_own_process(family) == steps


def test_pickled_weights_are_never_opened(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model(tied=True), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # not even a pickle: opening it would say so
    os.environ.update(choose_hardware(Config(), [Node("here", {"CPU": 2})]).sampler_env)
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        OpponentEngine(Saved(str(folder)), version=Version(0), dtype="float32", max_model_len=64, seed=0, settings={"enforce_eager": True})


def test_a_prompt_is_computed_once_for_both_its_answers_and_the_scores_are_the_same(tiny_model):
    """Whatever lies in the prefix cache: nothing, the prompt but for its end, all of it, or the answer's beginning too."""
    hardware = choose_hardware(Config(), [Node("here", {"CPU": 2})])
    os.environ.update(hardware.sampler_env)
    folder = tiny_model(tied=True)
    engine = OpponentEngine(Saved(str(folder)), version=Version(0), dtype="float32", max_model_len=128, seed=0, settings={**hardware.engine, "block_size": 32})
    model, rng, cached = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), np.random.default_rng(0), []
    add = engine._add
    engine._add = lambda tokens, params, future, finish: add(tokens, params, future, lambda output: (cached.append((params.prompt_logprobs, output.num_cached_tokens)), finish(output)))
    try:
        for length in (5, 31, 32, 33, 64, 80):
            prompt, answer = rng.integers(30, 500, length), rng.integers(30, 500, 24)
            expected = transformers_logps(model, prompt, answer)
            for again in range(3):  # the second time the answer's beginning is in the cache as well
                cached.clear()
                completion, scored = engine.play(Version(0), prompt, SAMPLED, answer).result(60)
                np.testing.assert_allclose(scored, expected, atol=1e-4)
                np.testing.assert_allclose(completion.logps, transformers_logps(model, prompt, completion.token_ids), atol=1e-4)
                scores = [number for logprobs, number in cached if logprobs is not None]
                best = engine.sample(Version(0), prompt, GREEDY).result(60).token_ids
                for continuation, greedy in ((answer, False), (best, True), (best[:1], True), (answer[:1], answer[0] == best[0])):
                    found = engine.likelihood(Version(0), prompt, continuation).result(60)
                    assert found.logp == pytest.approx(transformers_logps(model, prompt, continuation).sum(), abs=1e-3)
                    assert found.greedy == greedy
                assert scores[-1] < length and (again or scores == ([length, 0] if length % 32 == 0 else [length // 32 * 32]))
        with pytest.raises(ValueError, match="leave no room"):
            engine.play(Version(0), rng.integers(30, 500, 100), SAMPLED, rng.integers(30, 500, 40)).result(60)
        with pytest.raises(WrongVersion):
            engine.play(Version(1), prompt, SAMPLED, answer).result(60)
    finally:
        engine.close()
