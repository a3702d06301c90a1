"""What many tests share: tiny random models, random pairs, one-process torch.distributed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "offline"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("RAY_worker_niceness", "0")  # as in a run: a test must also end on a busy machine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Make (once) a random Llama of 2 layers with the demo's tokenizer: tiny_model(tied=...) -> folder."""
    made: dict[bool, Path] = {}

    def make(*, tied: bool) -> Path:
        if tied not in made:
            made[tied] = tmp_path_factory.mktemp("model") / ("tied" if tied else "untied")
            save_tiny_model(made[tied], tied=tied, seed=0)
        return made[tied]

    return make


def save_tiny_model(folder: Path, *, tied: bool, seed: int) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from spin_ray.demo import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:base"))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def make_pairs():
    """make_pairs(count, seed=0, longest=12) -> random pairs with random references."""

    def make(count: int, *, seed: int = 0, longest: int = 12):
        from spin_ray.records import Pair

        rng = np.random.default_rng(seed)
        pairs = []
        for k in range(count):
            prompt, real, generated = (int(rng.integers(1, longest + 1)) for _ in range(3))
            ids = [rng.integers(5, 500, length).astype(np.int32) for length in (prompt, real, generated)]
            logps = [(-rng.random(length)).astype(np.float32) for length in (real, generated)]
            pairs.append(Pair(k, 0, 0, 0, *ids, *logps, "stop"))
        return pairs

    return make


@pytest.fixture(scope="session")
def object_store(tmp_path_factory) -> Iterator[str]:
    """An S3 server on this machine: a run.dir with %s for a folder in its bucket. Credentials are in the environment."""
    from pyarrow.fs import FileSystem

    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "hush-hush", "AWS_EC2_METADATA_DISABLED": "true"}
    earlier = dict(os.environ)
    os.environ.update(credentials)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path_factory.mktemp("s3") / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while not _listens(port):
            assert server.poll() is None and time.monotonic() < until, f"no S3 server: {Path(log.name).read_text()[-1000:]}"
            time.sleep(0.1)
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        FileSystem.from_uri(f"s3://bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
        yield f"s3://bucket/%s?{options}"
    finally:
        server.terminate()
        server.wait(timeout=30)
        for name in credentials:
            os.environ.pop(name)
        os.environ.update(earlier)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
