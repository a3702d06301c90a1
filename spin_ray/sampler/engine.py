"""The opponent's vLLM engine: one thread steps it, any number of callers feed it (continuous batching).

The only file that imports vLLM. Answers come out one by one, so a block never waits for another block's longest answer.
"""

from __future__ import annotations

import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from spin_ray.errors import EngineFailed, WrongVersion
from spin_ray.records import Completion, SamplingSettings, Version


class OpponentEngine:
    """Samples from and scores under one version of the model at a time; `load` replaces the weights in place.

    `sample`, `score` and `load` return Futures at once. `load` waits for the requests before it and holds up those after it.
    After an engine error every Future, pending or later, carries it as EngineFailed.
    """

    def __init__(self, model_path: str, *, version: Version, dtype: str, max_model_len: int, seed: int, settings: Mapping[str, Any]):
        from vllm import EngineArgs, LLMEngine

        self.version, self._model_path = version, model_path
        self._max_model_len = max_model_len
        self._several_processes = settings.get("tensor_parallel_size", 1) > 1
        self._engine = LLMEngine.from_engine_args(EngineArgs(
            model=model_path, dtype=dtype, max_model_len=max_model_len, seed=seed, disable_log_stats=True,
            load_format="safetensors",  # vLLM's "auto" falls back to pickled weights, which may run code
            worker_extension_cls="spin_ray.sampler.worker.WorkerExtension", **settings,
        ))
        self._parts = {name.rpartition(".")[2] for name in self._engine.collective_rpc("module_names")[0]}
        self._inbox: queue.Queue[tuple[Future, Callable[[], None]] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[Future, Callable[[Any], Any]]] = {}
        self._error: BaseException | None = None
        self._next_id = 0
        self._step_began = math.inf
        """When the thread began what it is doing; inf: it waits for work."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def sample(self, version: Version, prompt_ids: Sequence[int], settings: SamplingSettings) -> Future[Completion]:
        """Draw one answer from `version`. Log-probs are of the model itself, before temperature and top-p."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens,
            stop_token_ids=list(settings.stop_ids), logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self._submit(version, prompt_ids, params, lambda output: _completion(version, output.outputs[0]))

    def score(self, version: Version, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Future[np.ndarray]:
        """Log-probs of a given answer under `version` by one prefill, [num_answer_tokens] float32, in nats."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens, num_answer = [*map(int, prompt_ids), *map(int, answer_ids)], len(answer_ids)
        return self._submit(version, tokens, params, lambda output: _first_logps(output.prompt_logprobs)[-num_answer:])

    def second_names(self, tied_names: Mapping[str, str]) -> dict[str, str]:
        """Of a model's tied names (second -> first) those that a load must carry: the engine has a part of that name.

        Where a Llama shares its embedding with an output layer of its own, which keeps old weights unless it gets new ones by
        name, a Gemma has no output layer, and vLLM refuses a weight for it.
        """
        return {second: first for second, first in tied_names.items() if second.split(".")[-2] in self._parts}

    def load(self, version: Version, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Future[Version]:
        """Replace the weights by those that `tensors()` yields, once the engine is idle; the Future holds the new version."""
        future: Future[Version] = Future()

        def swap() -> None:
            while self._pending:
                self._step()
            self._reload(tensors())
            if not self._engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not drop its prefix cache: answers would mix two versions")
            self.version = version
            future.set_result(version)

        return self._post(swap, future)

    def try_reload(self) -> Future[Version]:
        """Load the weights that the engine has, from their folder: what cannot be replaced in this model shows before it must be."""
        future: Future[Version] = Future()

        def reload() -> None:
            self._engine.collective_rpc("reload_opponent", kwargs={"folder": self._model_path, "trial": True})
            future.set_result(self.version)

        return self._post(reload, future)

    def _reload(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        if not self._several_processes:
            self._engine.collective_rpc("reload_opponent", kwargs={"tensors": tensors})
            return
        # The ranks of a tensor-parallel engine are processes of their own: they read the weights from a file in memory.
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="spin_ray_weights_") as folder:
            save_file({name: tensor.clone() for name, tensor in tensors}, f"{folder}/model.safetensors")
            self._engine.collective_rpc("reload_opponent", kwargs={"folder": folder})

    def stuck_s(self) -> float:
        """Seconds that the thread has been at its present step; 0 while it waits for work."""
        return max(0.0, time.monotonic() - self._step_began)

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _submit(self, version: int, token_ids: Sequence[int], params: Any, convert: Callable[[Any], Any]) -> Future:
        future: Future = Future()

        def add() -> None:
            if version != self.version:
                future.set_exception(WrongVersion(f"asked for {version}, this sampler holds {self.version}"))
                return
            if len(token_ids) >= self._max_model_len:
                future.set_exception(ValueError(f"{len(token_ids)} tokens leave no room in an engine of {self._max_model_len}"))
                return
            self._next_id += 1
            self._engine.add_request(str(self._next_id), {"prompt_token_ids": [int(i) for i in token_ids]}, params)
            self._pending[str(self._next_id)] = (future, convert)

        return self._post(add, future)

    def _post(self, action: Callable[[], None], future: Future) -> Future:
        with self._lock:
            if self._error:
                future.set_exception(self._error)
            else:
                self._inbox.put((future, action))
        return future

    def _loop(self) -> None:
        future: Future | None = None
        try:
            while (entry := self._next_entry()) is not None:
                future, action = entry
                action()
                future = None
        except BaseException as error:  # whatever it is, nobody may wait for a dead engine
            self._fail(error, future)

    def _next_entry(self) -> tuple[Future, Callable[[], None]] | None:
        """The next entry of the inbox; steps the engine as long as there is work and the inbox is empty."""
        while True:
            if not self._pending:
                self._step_began = math.inf
            try:
                entry = self._inbox.get(block=not self._pending)
            except queue.Empty:
                self._step()
            else:
                self._step_began = time.monotonic()
                return entry

    def _step(self) -> None:
        self._step_began = time.monotonic()
        for output in self._engine.step():
            if output.finished:
                future, convert = self._pending.pop(output.request_id)
                future.set_result(convert(output))

    def _fail(self, error: BaseException, current: Future | None) -> None:
        failed = EngineFailed(f"the sampler's engine failed: {type(error).__name__}: {error}")
        failed.__cause__ = error
        with self._lock:
            self._error = failed
            waiting = [future for future, _ in self._pending.values()] + ([current] if current else [])
            while not self._inbox.empty():
                entry = self._inbox.get()
                waiting += [entry[0]] if entry else []
        for future in waiting:
            if not future.done():
                future.set_exception(failed)


def _completion(version: Version, output: Any) -> Completion:
    return Completion(version, np.array(output.token_ids, np.int32), _first_logps(output.logprobs), output.finish_reason)


def _first_logps(flat: Any) -> np.ndarray:
    """Of vLLM's FlatLogprobs, the first entry of every position: the token itself. Positions without any are skipped."""
    starts = [start for start, end in zip(flat.start_indices, flat.end_indices, strict=True) if end > start]
    return np.array([flat.logprobs[start] for start in starts], np.float32)
