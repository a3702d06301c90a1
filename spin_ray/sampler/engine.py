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
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.torch import save_file

from spin_ray.errors import EngineFailed, WrongVersion
from spin_ray.exchange.adapters import AdapterFiles, read_adapter
from spin_ray.records import Completion, Likelihood, SamplingSettings, Saved, Version


class OpponentEngine:
    """Samples from and scores under one version of the model at a time; `load` replaces the weights in place.

    `sample`, `score` and `load` return Futures at once. `load` waits for the requests before it and holds up those after it.
    After an engine error every Future, pending or later, carries it as EngineFailed.
    """

    def __init__(self, saved: Saved, *, version: Version, dtype: str, max_model_len: int, seed: int, settings: Mapping[str, Any]):
        from vllm import EngineArgs, LLMEngine

        self.version, self._saved = version, saved
        adapter = read_adapter(Path(saved.adapter)) if saved.adapter else None
        self._max_model_len = max_model_len
        self.num_workers = settings.get("tensor_parallel_size", 1)
        """vLLM's, that share the model."""
        self._several_processes = self.num_workers > 1
        self._frees_memory = settings.get("enable_sleep_mode", False)
        self._engine = LLMEngine.from_engine_args(EngineArgs(
            model=saved.model, dtype=dtype, max_model_len=max_model_len, seed=seed, disable_log_stats=True,
            load_format="safetensors",  # vLLM's "auto" falls back to pickled weights, which may run code
            worker_extension_cls="spin_ray.sampler.worker.WorkerExtension", **settings, **(_for_adapter(adapter) if adapter else {}),
        ))
        self._parts = {name.rpartition(".")[2] for name in self._engine.collective_rpc("module_names")[0]}
        self._adapter: Any = None
        """What every request names, if there is an adapter: one without it would play with whichever adapter is there."""
        if adapter:
            self._take_adapter(adapter)
        self._inbox: queue.Queue[tuple[Future, Callable[[], None]] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[Future, Callable[[Any], None]]] = {}
        """Whom a request is for, and what is done with its output."""
        self._error: BaseException | None = None
        self._next_id = 0
        self._step_began = math.inf
        """When the thread began what it is doing; inf: it waits for work."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def sample(self, version: Version, prompt_ids: Sequence[int], settings: SamplingSettings) -> Future[Completion]:
        """Draw one answer from `version`. Log-probs are of the model itself, before temperature and top-p."""
        future: Future[Completion] = Future()
        return self._submit(version, prompt_ids, _drawing(settings), future, lambda output: future.set_result(_completion(version, output)))

    def score(self, version: Version, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Future[np.ndarray]:
        """Log-probs of a given answer under `version` by one prefill, [num_answer_tokens] float32, in nats."""
        future: Future[np.ndarray] = Future()
        tokens, num_answer = [*prompt_ids, *answer_ids], len(answer_ids)
        return self._submit(
            version, tokens, _scoring(), future, lambda output: future.set_result(_first_logps(output.prompt_logprobs)[-num_answer:])
        )

    def likelihood(self, version: Version, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Future[Likelihood]:
        """What `version` says of a given continuation of at least one token, behind at least one. Continuations of one prompt share what
        was computed of it: the prefix cache is read as in `play`.
        """
        future: Future[Likelihood] = Future()
        tokens, num_answer = [*prompt_ids, *answer_ids], len(answer_ids)

        def scored(output: Any) -> None:
            if output.num_cached_tokens < len(prompt_ids):
                future.set_result(_likelihood(output.prompt_logprobs, answer_ids))
            else:
                self._add(tokens, _scoring(beside=1), future, scored)

        assert num_answer and len(prompt_ids), "a first token has no log-prob"
        return self._submit(version, tokens, _scoring(read_cache=True, beside=1), future, scored)

    def play(
        self, version: Version, prompt_ids: Sequence[int], settings: SamplingSettings, answer_ids: Sequence[int]
    ) -> Future[tuple[Completion, np.ndarray]]:
        """`sample`, and `score` of a given answer to the same prompt, which is computed once: when it has been answered it is in the
        prefix cache. vLLM does not read that cache where log-probs of a prompt are asked for, as it has none of what lies there. Only
        the answer's are wanted here, so it may, as long as the prompt's last token, which the answer's first log-prob comes from, is not
        in it: else the answer is scored anew, without the cache.
        """
        future: Future[tuple[Completion, np.ndarray]] = Future()
        tokens, num_answer = [*prompt_ids, *answer_ids], len(answer_ids)

        def drawn(output: Any) -> None:
            completion = _completion(version, output)

            def scored(output: Any) -> None:
                if output.num_cached_tokens < len(prompt_ids):
                    future.set_result((completion, _first_logps(output.prompt_logprobs)[-num_answer:]))
                else:
                    self._add(tokens, _scoring(), future, scored)

            self._add(tokens, _scoring(read_cache=True), future, scored)

        return self._submit(version, prompt_ids, _drawing(settings), future, drawn)

    def second_names(self, tied_names: Mapping[str, str]) -> dict[str, str]:
        """Of a model's tied names (second -> first) those that a load must carry: the engine has a part of that name.

        Where a Llama shares its embedding with an output layer of its own, which keeps old weights unless it gets new ones by
        name, a Gemma has no output layer, and vLLM refuses a weight for it.
        """
        return {second: first for second, first in tied_names.items() if second.split(".")[-2] in self._parts}

    def load(self, version: Version, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Future[Version]:
        """Replace the weights by those that `tensors()` yields, once the engine is idle; the Future holds the new version."""
        return self._swap(version, lambda: self._reload(tensors()))

    def load_adapter(self, version: Version, files: Callable[[], AdapterFiles]) -> Future[Version]:
        """The same for an engine that has an adapter: that alone is replaced."""
        return self._swap(version, lambda: self._take_adapter(files()))

    def take_over(self, version: Version, replace: Callable[[Callable[..., Any]], None]) -> Future[Version]:
        """The same by whatever `replace` has vLLM's workers do: it gets `collective_rpc`, and returns when all weights are new."""
        return self._swap(version, lambda: replace(self._engine.collective_rpc))

    def _swap(self, version: Version, replace: Callable[[], None]) -> Future[Version]:
        future: Future[Version] = Future()

        def swap() -> None:
            self._finish_all()
            replace()
            self._drop_prefix_cache()
            self.version = version
            future.set_result(version)

        return self._post(swap, future)

    def sleep(self) -> Future[None]:
        """Once the engine is idle, free its device's memory: the weights go to the host's, the cache is dropped. Nothing is asked until
        `wake`. An engine without `enable_sleep_mode`, as on a CPU, keeps its memory.
        """

        def sleep() -> None:
            self._finish_all()
            self._drop_prefix_cache()
            if self._frees_memory:
                self._engine.sleep(level=1)

        return self._post_done(sleep)

    def wake(self) -> Future[None]:
        """Take the memory back, with the weights that were there."""

        def wake() -> None:
            if self._frees_memory:
                self._engine.wake_up()
            self._drop_prefix_cache()

        return self._post_done(wake)

    def forget_prompts(self) -> Future[None]:
        """Once the engine is idle, drop what it has computed of the prompts so far."""

        def forget() -> None:
            self._finish_all()
            self._drop_prefix_cache()

        return self._post_done(forget)

    def _post_done(self, action: Callable[[], None]) -> Future[None]:
        """Have the thread do something; the Future says when it is done."""
        future: Future[None] = Future()

        def act() -> None:
            action()
            future.set_result(None)

        return self._post(act, future)

    def _finish_all(self) -> None:
        while self._pending:
            self._step()

    def _drop_prefix_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: answers would mix two versions")

    def try_reload(self) -> Future[Version]:
        """Load the weights that the engine has, from their folder: what cannot be replaced in this model shows before it must be."""
        future: Future[Version] = Future()

        def reload() -> None:
            if self._saved.adapter:
                self._take_adapter(read_adapter(Path(self._saved.adapter)))
            else:
                self._engine.collective_rpc("reload_opponent", kwargs={"folder": self._saved.model, "trial": True})
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

    def _take_adapter(self, files: AdapterFiles) -> None:
        """Put an adapter in place of the present one. It has a number and a name of its own: vLLM's prefix cache knows it by that."""
        from vllm.lora.request import LoRARequest

        number = self._adapter.lora_int_id + 1 if self._adapter else 1
        call = {"number": number, "config": dict(files.config)}
        if self._several_processes:
            with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="spin_ray_adapter_") as folder:
                files.write(Path(folder))
                self._engine.collective_rpc("take_adapter", kwargs={**call, "folder": folder})
        else:
            self._engine.collective_rpc("take_adapter", kwargs={**call, "tensors": files.tensors})
        self._adapter = LoRARequest(f"adapter {number}", number, "in memory")
        self._engine.add_lora(self._adapter)
        if (there := set(self._engine.list_loras())) != {number}:
            raise RuntimeError(f"vLLM holds the adapters {sorted(there)} and not {number} alone")

    def stuck_s(self) -> float:
        """Seconds that the thread has been at its present step; 0 while it waits for work."""
        return max(0.0, time.monotonic() - self._step_began)

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _submit(self, version: Version, token_ids: Sequence[int], params: Any, future: Future, finish: Callable[[Any], None]) -> Future:
        """Have the thread add a request; `finish` gets its output."""

        def add() -> None:
            if version != self.version:
                future.set_exception(WrongVersion(f"asked for {version}, this sampler holds {self.version}"))
            else:
                self._add(token_ids, params, future, finish)

        return self._post(add, future)

    def _add(self, token_ids: Sequence[int], params: Any, future: Future, finish: Callable[[Any], None]) -> None:
        if len(token_ids) >= self._max_model_len:
            future.set_exception(ValueError(f"{len(token_ids)} tokens leave no room in an engine of {self._max_model_len}"))
            return
        self._next_id += 1
        tokens = {"prompt_token_ids": [int(i) for i in token_ids]}
        self._engine.add_request(str(self._next_id), tokens, params, lora_request=self._adapter)
        self._pending[str(self._next_id)] = (future, finish)

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
                _, finish = self._pending.pop(output.request_id)
                finish(output)

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


def _for_adapter(files: AdapterFiles) -> dict[str, Any]:
    """Settings of an engine that plays with one adapter at a time, of these layers.

    vLLM makes every layer that it can adapt ready for it, and of the output layer then computes log-probs of given texts wrongly.
    """
    from vllm.config.lora import MaxLoRARanks

    rank = min(rank for rank in get_args(MaxLoRARanks) if rank >= files.largest_rank)
    layers = {name.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2] for name in files.tensors}
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank, "lora_target_modules": sorted(layers)}


def _drawing(settings: SamplingSettings) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens, stop_token_ids=list(settings.stop_ids),
        logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=bool(settings.stop_texts), stop=list(settings.stop_texts), skip_special_tokens=False,
    )


def _scoring(*, read_cache: bool = False, beside: int = 0) -> Any:
    """Log-probs of a given text, and of the `beside` most likely tokens in every place."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=beside, flat_logprobs=True, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY, skip_reading_prefix_cache=not read_cache,
    )


def _completion(version: Version, output: Any) -> Completion:
    output = output.outputs[0]
    return Completion(version, np.array(output.token_ids, np.int32), _first_logps(output.logprobs), output.finish_reason)


def _first_logps(flat: Any) -> np.ndarray:
    """Of vLLM's FlatLogprobs, the first entry of every position: the token itself. Positions without any are skipped."""
    starts = [start for start, end in zip(flat.start_indices, flat.end_indices, strict=True) if end > start]
    return np.array([flat.logprobs[start] for start in starts], np.float32)


def _likelihood(flat: Any, answer_ids: Sequence[int]) -> Likelihood:
    """Of vLLM's FlatLogprobs with one token beside the given one: at each place the given token comes first, the most likely one next."""
    starts = [start for start, end in zip(flat.start_indices, flat.end_indices, strict=True) if end > start][-len(answer_ids) :]
    given = [flat.token_ids[start] for start in starts]
    assert given == [int(token) for token in answer_ids], "vLLM's log-probs are of other tokens"
    most_likely = [flat.token_ids[start + 1] for start in starts]
    return Likelihood(math.fsum(flat.logprobs[start] for start in starts), given == most_likely)
