"""Evaluation of opponent versions, with the samplers themselves: on held-out data and on tasks (tasks/), and in a run when.

Evaluation fills what the play of theta_t leaves of the samplers' time. What they have not begun when the next weights come is put off
until those have played their iteration; it is put off once, so that metrics, and the guards that read them, are one iteration late at most.

| in a run, who waits | for what |
|---|---|
| the evaluation of theta_t | iteration t played; the evaluation of theta_{t-1}, whose weights come back if it was put off |
| the load of theta_{t+1}, or of a snapshot of it | the evaluation of theta_{t-1} and of those before |
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from spin_ray.background import Threads
from spin_ray.chat import ChatFormat
from spin_ray.chatter import captured_output
from spin_ray.config import Config
from spin_ray.data import load_prompts
from spin_ray.errors import BadInput, Enough
from spin_ray.exchange.audit import compare
from spin_ray.exchange.pairs import read_pairs, write_table
from spin_ray.guard import check_nll
from spin_ray.heldout import OF_BEFORE, advantage, are_right, as_pairs, change, divergence, quality
from spin_ray.learner.loop import plain_real_logps
from spin_ray.lengths import Lengths
from spin_ray.manifest import RunDir
from spin_ray.methods import Method
from spin_ray.model import ModelFacts, inspect_model, longest_sequence
from spin_ray.overlap import Overlap
from spin_ray.placement import Hardware
from spin_ray.preflight import FIRST_ROWS, Proof, proof_pairs, refuse_sampler
from spin_ray.records import NO_LOGPS, PAIR_SCHEMA, Pair, Prompt, PublishedWeights, SamplingSettings, Saved, Version, from_table, to_table
from spin_ray.reporting import Reporting
from spin_ray.sampler.pool import EVALUATE, sampling_settings, start_opponent
from spin_ray.stop import Standing, judge
from spin_ray.system import ray_cluster
from spin_ray.theta import Thetas, write_quantized_base

if TYPE_CHECKING:
    from spin_ray.tasks.harness import Tasks


def run_eval(config: Config) -> None:
    """The command `eval`: metrics of `model.path` on `data.eval` and on `eval.tasks`, as one JSON object on standard output."""
    if not (config.data.eval or config.eval.tasks):
        raise BadInput("neither data.eval nor eval.tasks is set; eval needs held-out data, or tasks of lm-evaluation-harness")
    logs = config.run_path / "logs"
    to_read = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")  # standard output is for the numbers
    with to_read, captured_output(logs / "eval.log") as to_user:
        def say(text: str) -> None:
            print(text, file=to_read)

        facts, proof = inspect_model(config), Proof()
        tasks = tasks_of(config, facts, say)
        prompts, counts = _heldout(config, facts, proof)
        max_model_len = _longest(config, facts, prompts, tasks)
        with ray_cluster(config, learner=False, say=say) as hardware:
            saved = facts.saved
            if config.model.quantization:
                saved = Saved(str(RunDir(config.run_path).quantized_base()), saved.adapter)
                write_quantized_base(config, facts, Path(saved.model), hardware.dtype)
            refuse_sampler(facts, hardware, reloads=False)
            pool, _ = start_opponent(config, saved, 0, hardware, max_model_len=max_model_len, logs=logs, reloads=False)
            pool.release.remote(Version(0))
            say(proof.line(_sampler_beside_transformers(pool, prompts or tasks.examples(FIRST_ROWS), saved, hardware, logs)))
            found: dict[str, Any] = {}
            if prompts:
                metrics, _ = evaluate(pool, Version(0), prompts, facts.chat, sampling_settings(config, facts.chat))
                found = {"num_prompts": len(prompts), "rows": counts, **metrics}
            if tasks:
                found |= tasks.evaluate(pool, Version(0)).as_json()
        print(json.dumps({"model": facts.adapter or facts.path, **found}), file=to_user)


def _heldout(config: Config, facts: ModelFacts, proof: Proof) -> tuple[Sequence[Prompt], Mapping[str, int]]:
    """The held-out prompts, proved, and what became of the rows; none without `data.eval`."""
    data = config.data
    if not data.eval:
        return [], {}
    split = data.eval_split or data.split
    proof.tokens(data.eval, split, config, facts.chat)
    prompts, counts = load_prompts(data.eval, data, facts.chat, seed=config.run.seed, limit=data.max_eval_prompts, split=split)
    return prompts[:], counts


def _longest(config: Config, facts: ModelFacts, prompts: Sequence[Prompt], tasks: Tasks | None) -> int:
    """What the engine must take, in tokens."""
    of_prompts = longest_sequence(Lengths.of(prompts), config.sampler.max_new_tokens, facts) if prompts else 0
    return max(of_prompts, tasks.max_model_len if tasks else 0)


def _sampler_beside_transformers(pool: Any, prompts: Sequence[Prompt], saved: Saved, hardware: Hardware, logs: Path) -> str:
    """What the audit is in a run, which compares with the learner: `eval` has none. Raises AuditError if they disagree.

    Transformers computes on a CPU, while the engine starts.
    """
    pairs = proof_pairs(prompts)
    plain = ray.remote(num_cpus=0)(plain_real_logps).remote(saved, hardware.dtype, pairs, str(logs / "proof.log"))
    sampler = pool.score.remote(Version(0), [p.prompt_ids for p in pairs], [p.real_ids for p in pairs], EVALUATE)
    audit = compare(0, ray.get(sampler), ray.get(plain), hardware.audit_tolerance, other="plain transformers")
    return f"sampler: {audit.num_tokens} tokens, log-probs apart from plain transformers' by {audit.mean_nats:.1e} nats on average"


def evaluate(
    pool: Any, version: Version, prompts: Sequence[Prompt], chat: ChatFormat, settings: SamplingSettings
) -> tuple[dict[str, float], list[Pair]]:
    """Sample at temperature 1, and greedily where an answer can be checked, and score every held-out prompt.

    Returns `heldout.quality` and the version's answers as pairs.
    """
    questions, real = [p.prompt_ids for p in prompts], [p.real_ids for p in prompts]
    checkable = [prompt for prompt in prompts if prompt.answer is not None]
    at_one = pool.play.remote(version, questions, dataclasses.replace(settings, temperature=1.0, top_p=1.0), real, EVALUATE)
    greedily = dataclasses.replace(settings, temperature=0.0, top_p=1.0)
    greedy = pool.sample.remote(version, [p.prompt_ids for p in checkable], greedily, EVALUATE)
    played, best = ray.get([at_one, greedy])
    drawn, logps = map(list, zip(*played, strict=True))
    pairs = as_pairs(version.number, prompts, drawn, logps)
    right = are_right(prompts, [pair.generated_ids for pair in pairs], chat.decode)
    return quality(pairs, right, are_right(checkable, [answer.token_ids for answer in best], chat.decode)), pairs


ADVANTAGE_PROMPTS = 256
"""Held-out prompts, the first ones, on which versions are compared with earlier ones: a standard error of 0.03."""


def tasks_of(config: Config, facts: ModelFacts, say: Callable[[str], None]) -> Tasks | None:
    """What `eval.tasks` names, ready to be asked. Raises BadInput, before anything has been started, for what cannot be had."""
    if not config.eval.tasks:
        return None
    from spin_ray.tasks.harness import load_tasks  # lm_eval is loaded by those who ask for it

    return load_tasks(config.eval, facts, say)


class Evaluations:
    """Those of one run, each in a thread of its own. `start` and `tied_names` are the main thread's."""

    def __init__(
        self, config: Config, method: Method, thetas: Thetas, facts: ModelFacts, heldout: Sequence[Prompt], pool: Any, overlap: Overlap,
        threads: Threads, reporting: Reporting, tasks: Tasks | None = None,
    ):
        self._config, self._method, self._thetas, self._run, self._facts = config, method, thetas, (run := thetas.run), facts
        self._heldout, self._tasks, self._pool = heldout, tasks, pool
        self._overlap, self._threads, self._reporting = overlap, threads, reporting
        self._settings = sampling_settings(config, facts.chat)
        self._started: dict[int, Future] = {}
        self._judging = threading.Lock()
        self._coming = 0
        """Number of the newest version that is to be loaded."""
        self.tied_names: Mapping[str, str] = (run.marks("iteration") or [{}])[-1].get("tied_names", {})
        """Of the model, whatever its version: what is loaded from disk needs them."""

    def start(self, version: int, trained: Mapping[str, Any]) -> None:
        """Evaluate theta_version when its iteration is played; its row of the table takes up `trained`."""
        self._started[version] = self._threads.start(self._evaluate, version, trained, self._started.get(version - 1))

    def wait(self, version: int) -> None:
        """Until theta_version's evaluation, which has been started, is done."""
        self._threads.result(self._started[version])

    def make_way(self, version: Version) -> None:
        """Before theta_version, or a snapshot of it, is loaded: an evaluation is put off once, not for ever."""
        self._coming = version.number
        for earlier in [number for number in list(self._started) if number < version.number - 1]:
            self._threads.result(self._started[earlier])

    def _evaluate(self, version: int, trained: Mapping[str, Any], before: Future | None) -> None:
        metrics = self._run.evaluations().get(version, {})
        asks_heldout, asks_tasks = bool(self._heldout and not metrics), self._owes_tasks(version)
        if asks_heldout or asks_tasks:
            self._overlap.wait_until_may_evaluate(version)
            if before and not before.done():
                self._catch_up(version, before)
        if asks_heldout:
            metrics = self._on_heldout(version)
        self._reporting.row(version, metrics, trained)
        if metrics and version:
            name = "real_nll_nats_per_token"
            check_nll(version, metrics[name], self._run.evaluations()[0][name], self._config, self._thetas.name(version))
        if asks_tasks:
            self._on_tasks(version)
        if metrics:
            self._judge(version)

    def _on_heldout(self, version: int) -> dict[str, float]:
        metrics, pairs = evaluate(self._pool, Version(version), self._heldout, self._facts.chat, self._settings)
        beside, of_before = self._beside_earlier(version, pairs) if version else ({}, [])
        metrics |= beside
        of_before = [*of_before, *[NO_LOGPS] * (len(pairs) - len(of_before))]
        table = to_table(pairs, PAIR_SCHEMA).append_column(OF_BEFORE, pa.array(of_before, pa.list_(pa.float32())))
        write_table(self._run.heldout_answers(version), table, self._run.storage)
        self._reporting.tracker.log("eval", metrics, opponent_version=version)
        self._run.mark("evaluation", version=version, metrics=metrics)
        return metrics

    def _owes_tasks(self, version: int) -> bool:
        """Whether the version has not yet been asked what `eval` says."""
        asked = dataclasses.asdict(self._config.eval)
        return self._tasks is not None and not any(
            mark["version"] == version and mark["asked"] == asked for mark in self._run.marks("tasks")
        )

    def _on_tasks(self, version: int) -> None:
        numbers = self._tasks.evaluate(self._pool, Version(version))
        self._run.mark("tasks", version=version, asked=dataclasses.asdict(self._config.eval), **numbers.as_json())
        self._reporting.tasks(version, numbers.metrics(), numbers.line())

    def _beside_earlier(self, version: int, pairs: Sequence[Pair]) -> tuple[dict[str, float], list[np.ndarray]]:
        """The advantage over theta_{version-1}, how far the version is from that and from theta_0, and what it has gained since; and its
        log-probs of the first answers of theta_{version-1}.
        """
        all_before, all_first = (self._answers(earlier) for earlier in (version - 1, 0))
        before, first = all_before[:ADVANTAGE_PROMPTS], all_first[:ADVANTAGE_PROMPTS]
        asked = [before] if version == 1 else [before, first]
        scored = ray.get([
            self._pool.score.remote(Version(version), [p.prompt_ids for p in those], [p.generated_ids for p in those], EVALUATE)
            for those in asked
        ])
        real = [pair.opponent_real_logps for pair in pairs[:ADVANTAGE_PROMPTS]]
        metrics = {
            **advantage(before, real, scored[0], self._method.objective(version - 1)),
            "kl_from_opponent_nats_per_token": divergence(before, scored[0]),
            "kl_from_start_nats_per_token": divergence(first, scored[-1]),
            **change(pairs, all_first, self._right(pairs), self._right(all_first)),
        }
        return metrics, scored[0]

    def _right(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        return are_right(self._heldout, [pair.generated_ids for pair in pairs], self._facts.chat.decode)

    def _answers(self, version: int) -> list[Pair]:
        return from_table(read_pairs(self._run.heldout_answers(version), self._run.storage), Pair)

    def _judge(self, version: int) -> None:
        """Name the best version so far; end all waits with `Enough` if there is nothing more to gain."""
        with self._judging:
            verdict = judge([self._standing(earlier) for earlier in range(version + 1)], self._config.spin)
            start = self._config.model.adapter or self._config.model.path
            self._run.name_best(self._thetas.name(verdict.best) if verdict.best else start)
        asked = self._run.stop_file
        reason = verdict.reason or (f"asked to by {asked}: {asked.read_text().strip()}" if asked.exists() else "")
        if reason and len(self._run.marks("iteration")) < self._method.num_iterations:
            self._threads.fail(Enough(reason))

    def _standing(self, version: int) -> Standing:
        pairs, metrics = self._answers(version), self._run.evaluations()[version]
        nll = -np.array([pair.opponent_real_logps.sum(dtype=np.float64) for pair in pairs])
        tokens = np.mean([len(pair.real_ids) for pair in pairs])
        accuracy = (metrics["advantage_accuracy"], metrics["advantage_accuracy_se"]) if version else None
        return Standing(version, nll / tokens, self._right(pairs), accuracy)

    def _catch_up(self, version: int, before: Future) -> None:
        """First the evaluation of the version before, which was put off: its weights come back for as long as it takes."""
        self._load_again(version - 1, present=version)
        self._threads.result(before)
        if self._coming <= version:
            self._load_again(version, present=version)

    def _load_again(self, version: int, *, present: int) -> None:
        weights = PublishedWeights(Version(version), (), 0, self.tied_names, saved_at=self._thetas.played(version))
        self._threads.result(self._pool.load_again.remote(weights, Version(present)).future())
