"""A hub name that cannot be had is told at once, whatever keeps it from being had."""

import socket
import threading
import time

import pytest

from spin_ray import hub
from spin_ray.errors import BadInput
from spin_ray.hub import check_on_hub


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """endpoint(address): from now on the hub is there, and nothing is in the cache."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return lambda address: monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", address, raising=False) or monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)


def refused(name, **kind):
    begun = time.monotonic()
    with pytest.raises(BadInput) as error:
        check_on_hub(name, "model.path", **kind)
    return str(error.value), time.monotonic() - begun


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network(endpoint, address):
    endpoint(address)
    said, seconds = refused("someone/model")
    assert "model.path=someone/model: no folder here" in said and "cannot be asked" in said and seconds < hub.ASK_S


def test_a_network_that_swallows_everything(endpoint, monkeypatch):
    monkeypatch.setattr(hub, "ASK_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        said, seconds = refused("someone/model")
    assert "cannot be asked" in said and seconds < 5


def test_a_name_that_is_none(endpoint):
    said, _ = refused("a b/c")
    assert "no name on the hub either" in said


def test_offline_is_said(endpoint, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said, seconds = refused("someone/data", kind="dataset")
    assert "HF_HUB_OFFLINE" in said and seconds < 5


def test_what_is_in_the_cache_is_not_asked_for(endpoint, tmp_path):
    endpoint("http://127.0.0.1:9")
    (tmp_path / "models--someone--model").mkdir()
    check_on_hub("someone/model", "model.path")
    refused("someone/model", kind="dataset")


def test_a_repository_that_is_not_there(endpoint):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        said, _ = refused("someone/model")
        thread.join(timeout=10)
    assert "the hub has no model of that name" in said
