"""The tasks of a run: made ready once, before the players start, and then asked of one version after the other.

What is wrong with a task shows at the door: its name, its data, its templates, its lengths. There all requests are made, as texts; each
version answers the same ones.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size

from spin_ray.config import EvalConfig
from spin_ray.errors import BadInput, in_one_line
from spin_ray.model import ModelFacts
from spin_ray.records import Prompt, Version
from spin_ray.tasks.asking import Answers, PoolAnswers
from spin_ray.tasks.found import Built, find_tasks, leaves
from spin_ray.tasks.model import SamplerModel
from spin_ray.tasks.numbers import TaskNumbers, in_words

BOOTSTRAPS = 1000
"""Resamples for the standard error of a metric that has no formula for it, such as F1; that of a mean has one."""
REQUEST_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Tasks:
    """All of a run, with their requests. Thread-safe: one version at a time."""

    def __init__(self, built: Sequence[Built], facts: ModelFacts, config: EvalConfig, max_length: int):
        self._built, self._facts, self._config, self.max_length = built, facts, config, max_length
        self._tasks = {task.task_name: task for each in built for task in leaves(each)}
        self._evaluating = threading.Lock()

    @property
    def max_model_len(self) -> int:
        """What an engine must take: all that the model reads, one token that is only scored, and one that vLLM draws behind it."""
        return self.max_length + 2

    def evaluate(self, pool: Any, version: Version) -> TaskNumbers:
        """Ask everything of one version. `pool`: actor handle of the SamplerPool."""
        return self.ask(PoolAnswers(pool, version))

    def ask(self, answers: Answers) -> TaskNumbers:
        with self._evaluating:
            for instance in self._instances():
                instance.resps, instance.filtered_resps = [], {}
            model = SamplerModel(self._facts.chat, self.max_length, answers)
            found = evaluate(
                model, {"tasks": self._tasks, "groups": self._groups()}, limit=self._config.limit, bootstrap_iters=BOOTSTRAPS,
                log_samples=False, apply_chat_template=self._config.chat_template, fewshot_as_multiturn=True,
            )
        return TaskNumbers(
            in_words(found["results"]), self._heads(), model.num_truncated, model.num_windowed, self.max_length,
            {name: task.config.num_fewshot for name, task in self._tasks.items()}, found["versions"], version_of("lm_eval"),
        )

    def examples(self, count: int) -> list[Prompt]:
        """So many of the tasks' texts as prompts with an answer, cut in their middle: for a proof on tokens that the model will see."""
        model, texts = SamplerModel(self._facts.chat), dict.fromkeys(instance.args[0] for instance in self._instances())
        ids = [np.array(model.tok_encode(text)[: self.max_length], np.int32) for text in itertools.islice(texts, count)]
        halves = [(each[: len(each) // 2], each[len(each) // 2 :]) for each in ids if len(each) > 1]
        return [Prompt(number, *each) for number, each in enumerate(halves)]

    def _instances(self) -> Iterator[Any]:
        return (instance for task in self._tasks.values() for instance in task.instances)

    def _groups(self) -> dict[str, Group]:
        groups = [each for each in self._built if isinstance(each, Group)]
        return {each.name: each for top in groups for each in (top, *top.get_all_groups())}

    def _heads(self) -> tuple[str, ...]:
        grouped = {task.task_name for group in self._groups().values() for task in group.get_all_tasks()}
        return (*self._groups(), *(name for name in self._tasks if name not in grouped))


def load_tasks(config: EvalConfig, facts: ModelFacts, say: Callable[[str], None]) -> Tasks:
    """What `eval.tasks` names, ready to be asked. `say` gets what a user should know of lengths. Raises BadInput in one line."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this process, with all its threads, to resample
    random.seed(DEFAULT_RANDOM_SEED)  # as the harness' own command does: some tasks shuffle their choices when they are loaded
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    found = find_tasks(config)
    for (name, _), (built, shots) in zip(config.wanted, found, strict=True):
        for task in (task for each in built for task in leaves(each)):
            _refuse(task)
            _set_shots(task, config.num_fewshot if shots is None else shots, name, say)
            _make_requests(task, config, facts)
    built = [each for group, _ in found for each in group]
    _refuse_twice([task.task_name for each in built for task in leaves(each)])
    return Tasks(built, facts, config, _fit(built, config, facts, say))


def _refuse(task: Task) -> None:
    name = f"eval.tasks: {task.task_name}"
    if getattr(task, "UNSAFE_CODE", False):
        raise BadInput(f"{name} runs code that the model writes, which a run does not do")
    if getattr(task, "MULTIMODAL", False):
        raise BadInput(f"{name} needs pictures or sound; the samplers read text")


def _refuse_twice(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(f"eval.tasks has {', '.join(twice)} twice, alone and in a group or folder, or in two of these")


def _set_shots(task: Task, shots: int | None, name: str, say: Callable[[str], None]) -> None:
    """As the harness' own command does: a task that says 0 itself keeps that."""
    own = task.config.num_fewshot
    if own == 0 and shots:
        say(f"eval.tasks={name}: {task.task_name} is made for no examples before its questions, so it gets none instead of {shots}")
    elif shots is not None or own is None:
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _make_requests(task: Task, config: EvalConfig, facts: ModelFacts) -> None:
    """Once for all versions: what the harness would make anew each time is the same each time."""
    model = SamplerModel(facts.chat)
    try:
        task.build_all_requests(
            limit=get_sample_size(task, config.limit), apply_chat_template=config.chat_template, fewshot_as_multiturn=True,
            chat_template=model.apply_chat_template if config.chat_template else None, tokenizer_name=model.tokenizer_name,
        )
    except Exception as error:  # templates are programs: Jinja's, Python's and the data set's errors have no common base
        why = f"{type(error).__name__}: {in_one_line(error)}"
        raise BadInput(f"eval.tasks: {task.task_name}: its requests cannot be made: {why}") from error
    kinds = {instance.request_type for instance in task.instances}
    if others := kinds.difference(REQUEST_KINDS):
        raise BadInput(f"eval.tasks: {task.task_name} makes requests of the kind {', '.join(others)}; known are {', '.join(REQUEST_KINDS)}")
    task.build_all_requests = lambda **_: None


def _fit(built: Sequence[Built], config: EvalConfig, facts: ModelFacts, say: Callable[[str], None]) -> int:
    """How many tokens the model has to read: `eval.max_length`, or as many as the longest request has, if the model can read those."""
    tasks = [task for each in built for task in leaves(each)]
    lengths = {task.task_name: _lengths(task, facts) for task in tasks}
    most = _most(facts)
    if config.max_length and most and config.max_length > most:
        raise BadInput(f"eval.max_length={config.max_length}: the model takes at most {most} tokens here; lower it, or leave it out")
    longest = max(int(found[:, 0].max()) for found in lengths.values())
    max_length = config.max_length or min(longest, most or longest)
    for name, found in lengths.items():
        if (least := int(found[:, 1].max())) > max_length:
            raise BadInput(
                f"eval.tasks: {name} has an answer of up to {least} tokens, and {max_length} can be read; raise eval.max_length"
                + (f", which may be {most}" if most else "") + ", or leave the task out"
            )
        if cut := int((found[:, 0] > max_length).sum()):
            say(
                f"eval.tasks: {cut} of {len(found)} requests of {name} are longer than the {max_length} tokens that are read "
                f"(longest {int(found[:, 0].max())}): their begin is cut off, or they are read in windows, as lm-evaluation-harness does"
            )
    return max_length


def _lengths(task: Task, facts: ModelFacts) -> np.ndarray:
    """Of every request the tokens of all of it, and of what must not be cut: [num_requests, 2]."""
    model = SamplerModel(facts.chat)
    try:
        return np.array([model.lengths(instance) for instance in task.instances])
    except BadInput as error:
        raise BadInput(f"eval.tasks: {task.task_name}: {error}") from error


def _most(facts: ModelFacts) -> int | None:
    """Tokens that the model can read with the two that vLLM needs beside them; None: any number. Past `longest_exact` vLLM would take other
    factors for all requests, a run's own among them.
    """
    limits = [limit for limit in (facts.max_positions, facts.longest_exact) if limit]
    return min(limits) - 2 if limits else None
