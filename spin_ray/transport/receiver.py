"""The sampler's side of a transfer by vLLM's weight-transfer engines: the engine's thread does what the sender asks.

    pool ─ load ─► sampler ─ send(me) ─► sender ─ serve_sender ─► sampler ─ Handover ─► engine's thread ─ collective_rpc ─► workers
                                           └───────────────────── broadcast, in a group of their own ─────────────────────────┘

| who waits | for what | unblocked by |
|---|---|---|
| the engine's thread | the sender's next request, then the broadcast | the sender; or the end of its process |
| the sender | its request to be done; the other end of the broadcast | the engine's thread; or its end, which comes with the last load |
| `load` | the sender's answer, the engine's new version | either's error, or `weights.timeout_s`: then the pool ends this process |
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import ray

from spin_ray.config import WeightsConfig
from spin_ray.errors import TransferFailed, in_one_line
from spin_ray.records import PublishedWeights
from spin_ray.storage import Disk
from spin_ray.transport.sender import Backend, start_sender

LAST = "end_transfer"
"""Of what a sender asks; see sampler/worker.py."""


class Handover:
    """Carries what a sender asks to the engine's thread, which does nothing else until the last of it is done."""

    def __init__(self) -> None:
        self._asked: queue.Queue[tuple[str, Mapping[str, Any], Future]] = queue.Queue()

    def ask(self, verb: str, arguments: Mapping[str, Any]) -> Future[None]:
        done: Future[None] = Future()
        self._asked.put((verb, arguments, done))
        return done

    def carry_out(self, call_workers: Callable[..., Any]) -> None:
        """On the engine's thread. What a worker raises, the sender hears too."""
        verb = ""
        while verb != LAST:
            verb, arguments, done = self._asked.get()
            try:
                call_workers(verb, kwargs=dict(arguments))
            except BaseException as error:
                done.set_exception(RuntimeError(f"{verb}: {type(error).__name__}: {error}"))
                raise
            done.set_result(None)


class Receiver:
    """What the transports that send have in common: a `Transport` but for its `backend`."""

    backend: Backend

    def __init__(self, weights: WeightsConfig):
        self._timeout_s = weights.timeout_s
        self._next_sender: Any = None
        self._handover: Handover | None = None

    def prepare(self, *, log_path: str, env: Mapping[str, str], gpu: str) -> None:
        """A sender serves one publication: it, and what it holds of a GPU, ends with that."""
        if self._next_sender is None:
            self._next_sender = start_sender(self.backend, log_path=log_path, env=env, gpu=gpu)

    def sender(self) -> Any:
        sender, self._next_sender = self._next_sender, None
        return sender

    def engine_settings(self) -> dict[str, Any]:
        from vllm.config import WeightTransferConfig

        self.backend.register()
        return {"weight_transfer_config": WeightTransferConfig(backend=self.backend.name)}

    async def serve(self, verb: str, arguments: Mapping[str, Any]) -> None:
        assert self._handover, f"{verb}: this sampler is not being loaded by a sender"
        await asyncio.wrap_future(self._handover.ask(verb, arguments))

    async def load(self, engine: Any, weights: PublishedWeights, storage: Disk) -> float:
        handover = self._handover = Handover()
        begun, me = time.perf_counter(), ray.get_runtime_context().current_actor
        loading = engine.take_over(weights.version, handover.carry_out)
        second_names = engine.second_names(weights.tied_names)
        try:
            async with asyncio.timeout(self._timeout_s):
                sent = weights.sender.send.remote(weights.buckets, second_names, me, engine.num_workers, self._timeout_s)
                await asyncio.gather(sent, asyncio.wrap_future(loading))
        except Exception as error:  # whatever it is: the engine may be blocked in the broadcast, and holds no whole version
            raise TransferFailed(f"{weights.version} did not arrive over {self.backend.name}: {_why(error, self._timeout_s)}") from error
        return time.perf_counter() - begun


def _why(error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"not within weights.timeout_s={timeout_s:g}"
    if isinstance(error, ray.exceptions.RayActorError):
        return "the sender died"
    return in_one_line(error)
