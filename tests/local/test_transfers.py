"""Weights into real vLLM engines by a real sender process, over gloo: the same as through the object store, whatever breaks on the way."""

import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_faults import ROOT
from transformers import AutoModelForCausalLM
from watching import records, wait_for

from spin_ray.config import Config, SamplerConfig, WeightsConfig
from spin_ray.exchange.weights import BUCKET_BYTES, to_bucket
from spin_ray.records import PublishedWeights, Saved, Version
from spin_ray.sampler.pool import start_opponent
from spin_ray.system import ray_cluster
from spin_ray.transport.fake import FaultySender
from spin_ray.transport.gloo import Transport
from spin_ray.transport.nccl import Transport as Nccl
from spin_ray.transport.sender import Sender

PROMPT, ANSWER = np.array([3, 50, 60, 70, 1, 4], np.int32), np.arange(40, 60, dtype=np.int32)
BACKEND = replace(Transport.backend, chunk_bytes=16_384)  # so that a tiny model takes many broadcasts
TIMEOUT_S = 40.0
SAMPLER = "ray::Sampler"


@pytest.fixture(scope="module")
def opponent(tiny_model, tmp_path_factory):
    """Two real samplers of a tied model, that take weights over gloo: (pool, a moved copy of their model, log folder, environment)."""
    folder, logs = tiny_model(tied=True), tmp_path_factory.mktemp("logs")
    config = replace(
        Config(), weights=WeightsConfig("gloo", TIMEOUT_S), sampler=SamplerConfig(num_replicas=2, max_restarts=0, cpus_per_replica=0.1)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with ray_cluster(config, learner=False) as hardware:
        pool, _ = start_opponent(config, Saved(str(folder)), 0, hardware, max_model_len=64, logs=logs, reloads=False)
        ray.get(pool.ready.remote(2))
        yield pool, model, logs, hardware.sampler_env


def moved(model, seed):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def published(model, version, sender=None):
    """As a learner's worker publishes it: in two buckets, a tied weight under its first name."""
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    buckets = [ray.put(to_bucket(part)) for part in (tensors[:7], tensors[7:])]
    return PublishedWeights(version, tuple(buckets), 1, {"lm_head.weight": "model.embed_tokens.weight"}, sender=sender)


def new_sender(logs, env, kind=Sender, **fault):
    options = {"num_cpus": 0, "max_concurrency": 100}
    sender = ray.remote(**options)(kind).remote(BACKEND, log_path=str(logs / "sender.log"), env=env, gpu="", **fault)
    ray.get(sender.ready.remote())
    return sender


def logps(pool, version):
    """By both replicas: more prompts than one is given at a time."""
    return np.array(ray.get(pool.score.remote(version, [PROMPT] * 64, [ANSWER] * 64)))


def expected(model):
    ids = torch.tensor([[*PROMPT, *ANSWER]]).long()
    with torch.no_grad():
        found = torch.log_softmax(model(ids).logits[0], -1)
    return found[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None])[:, 0].numpy()


def test_what_is_sent_is_what_would_be_fetched(opponent):
    pool, model, logs, env = opponent
    ray.get(pool.release.remote(Version(0)))
    before = logps(pool, Version(0))
    moved(model, 7)
    sender = new_sender(logs, env)
    seconds = ray.get(pool.load.remote(published(model, Version(1), sender)))
    ray.get(pool.release.remote(Version(1)))
    sent = logps(pool, Version(1))
    ray.get(pool.load.remote(published(model, Version(2))))
    ray.get(pool.release.remote(Version(2)))
    assert len(seconds) == 2 and np.array_equal(sent, logps(pool, Version(2)))
    np.testing.assert_allclose(sent, np.tile(expected(model), (64, 1)), atol=1e-4)
    assert np.abs(sent - before).mean() > 0.05
    assert ray.get(pool.failed_transfers.remote()) == [] and ray.get(pool.num_restarts.remote()) == 0
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(sender.send.remote([], {}, None, 1, 1.0))  # it has ended with its publication


@pytest.mark.parametrize("fault, said", [
    ("dies", "(the sender died|the sampler's engine failed)"),  # both ends hear of it, one of them first
    pytest.param("hangs", f"not within weights.timeout_s={TIMEOUT_S:g}", marks=pytest.mark.slow),
    pytest.param("raises", "this sender was told to raise", marks=pytest.mark.slow),
])
def test_a_transfer_that_breaks_in_the_middle_is_repeated_over_the_object_store(opponent, fault, said):
    pool, model, logs, env = opponent
    version = Version(3 + ["dies", "hangs", "raises"].index(fault))
    moved(model, version.number)
    engines, restarts = titled(SAMPLER), ray.get(pool.num_restarts.remote())
    sender = new_sender(logs, env, FaultySender, fault=fault, after=9)
    begun = time.monotonic()
    ray.get(pool.load.remote(published(model, version, sender)))
    ray.get(pool.release.remote(version))
    after = logps(pool, version)
    np.testing.assert_allclose(after, np.tile(expected(model), (64, 1)), atol=1e-4)
    ray.get(pool.ready.remote(2))
    failed = ray.get(pool.failed_transfers.remote())
    assert [line.split(":")[0] for line in sorted(failed)] == ["sampler 0", "sampler 1"]
    assert all(re.search(rf"theta_{version.number} did not arrive over gloo: .*{said}", line) for line in failed), failed
    assert ray.get(pool.num_restarts.remote()) == restarts + 2
    assert len(engines) == 2 and not any(engine.is_running() for engine in engines)
    assert fault != "hangs" or time.monotonic() - begun > TIMEOUT_S


def test_nccl_gets_the_same_requests_with_a_group_of_its_own_for_every_replica(monkeypatch, tiny_model):
    """All but NCCL itself: vLLM's trainer is the real one, its endpoint and its broadcast are not."""
    from vllm.distributed.weight_transfer import nccl_engine

    model, asked, sent, gone = AutoModelForCausalLM.from_pretrained(tiny_model(tied=True), dtype=torch.bfloat16), [], [], []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: SimpleNamespace(destroy=lambda: gone.append(info.master_port)))
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **options: sent.append((dict(iterator), options)))
    monkeypatch.setattr("spin_ray.transport.sender.ray", SimpleNamespace(
        get=lambda value, timeout=None: value, util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    ))
    sampler = SimpleNamespace(serve_sender=SimpleNamespace(remote=lambda verb, arguments: asked.append((verb, arguments))))
    sender = object.__new__(Sender)
    sender._backend = replace(Nccl.backend, device="cpu")
    bucket, tied = to_bucket((name, p.detach()) for name, p in model.named_parameters()), {"lm_head.weight": "model.embed_tokens.weight"}
    for _ in range(2):
        sender._send([bucket], tied, sampler, 2, time.monotonic() + 60)
    assert [verb for verb, _ in asked] == 2 * ["join_transfer", "begin_transfer", "update_weights", "end_transfer"]
    joined = [nccl_engine.NCCLWeightTransferInitInfo(**arguments["init_info"]) for verb, arguments in asked if verb == "join_transfer"]
    assert {(info.rank_offset, info.world_size, info.packed, info.packed_buffer_size_bytes) for info in joined} == {(1, 3, True, BUCKET_BYTES)}
    assert gone == [info.master_port for info in joined]
    promised = nccl_engine.NCCLWeightTransferUpdateInfo(**asked[2][1]["update_info"])
    tensors, options = sent[0]
    assert list(tensors) == promised.names and set(promised.dtype_names) == {"bfloat16"} and options["buffer_size_bytes"] == BUCKET_BYTES
    assert torch.equal(tensors["lm_head.weight"], model.model.embed_tokens.weight) and len(tensors) == len(dict(model.named_parameters())) + 1


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_both_ends_cut_the_tensors_into_the_same_chunks(sizes, limit):
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

    from spin_ray.transport.gloo_engine import _until_full

    tensors = iter([(str(k), torch.zeros(size, dtype=torch.uint8)) for k, size in enumerate(sizes)])
    with warnings.catch_warnings(action="ignore"):  # of a tensor that is larger than a chunk
        sent = [chunk.tensor_sizes for chunk in iter(lambda: pack_tensors(tensors, lambda entry: entry[1], limit), None)]
    entries = iter([(size,) for size in sizes])
    assert sent == [[size for (size,) in chunk] for chunk in iter(lambda: list(_until_full(entries, limit)), [])]


def titled(title, pid=None) -> list[psutil.Process]:
    """Processes below this one that show such a title."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].split(".")[0] == title:
                found.append(process)
    return found


def start(runs, name, *more) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "spin_ray", "run", "conf/demo.yaml", f"run.dir={runs}", f"run.name={name}", "spin.num_iterations=2",
         "data.max_prompts=96", "data.eval=''", "sampler.block_prompts=16", "learner.batch_pairs=16", "sampler.temperature=0", *more],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


def output_of(process) -> str:
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_a_run_whose_first_sender_hangs_goes_on_with_what_the_object_store_has(tmp_path):
    """The audit of each version compares the sampler with the learner: of theta_1, which is fetched, and of theta_2, which is sent."""
    process, run = start(tmp_path, "sent", "weights.transport=gloo", "weights.timeout_s=45"), tmp_path / "sent"

    def senders():
        return titled("ray::Sender", process.pid)

    wait_for(lambda: senders() or process.poll() is not None, "the first sender")
    (hung,) = senders()
    hung.suspend()
    output = output_of(process)
    told = [line for line in output.splitlines() if "did not arrive" in line]
    assert len(told) == 1 and told[0].endswith(
        "sampler 0: theta_1 did not arrive over gloo: not within weights.timeout_s=45; its process starts anew and fetches them "
        "from the object store; see logs/sender.log"
    ), output
    metrics = records(run, "metrics.jsonl")
    assert [r["sync/num_failed_transfers"] for r in metrics if "sync/num_failed_transfers" in r] == [1, 0]
    assert [r["opponent_version"] for r in metrics if "audit/mean_abs_logp_difference_nats" in r] == [0, 1, 2]
    assert max(r.get("audit/max_abs_logp_difference_nats", 0.0) for r in metrics) < 1e-3 and not hung.is_running()
