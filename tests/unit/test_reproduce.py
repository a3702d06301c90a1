"""docs/reproduce.md: its commands are commands, its tasks are tasks, its metrics are what they are called."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from spin_ray.config import load_config
from spin_ray.submit import parser
from spin_ray.tasks.numbers import in_words

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reproduce.md").read_text()
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    match program.rpartition("/")[2]:
        case "spin-ray":
            load_config(words[1], words[2:])
            assert words[0] in ("config", "run", "eval")
        case "submit.sh":
            parser().parse_args(words)
            load_config(words[0], words[1:])
        case "hf":
            known = subprocess.run([ROOT / program, words[0], "--help"], capture_output=True, text=True, check=True).stdout
            assert all(word in known for word in words if word.startswith("--"))
        case "grep":
            assert words[1].startswith("runs/paper/")
        case _:
            pytest.fail(f"{command}: nobody knows this program")


def test_the_papers_tasks_are_the_harness():
    manager, config = TaskManager(), load_config(ROOT / "conf/paper.yaml")[0]
    assert [name for name, _ in config.eval.wanted if name not in manager.task_index] == []
    assert dict(config.eval.wanted) == {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5}
    for task, metric in re.findall(r"`tasks/(\w+?)_(acc|acc_norm|exact_match_strict_match)`", PAGE):
        shown = {"acc": "acc,none", "acc_norm": "acc_norm,none"}.get(metric, "exact_match,strict-match")
        assert task in dict(config.eval.wanted) and in_words({task: {shown: 0.5}}) == {task: {metric: 0.5}}
        assert shown.partition(",")[0] in str(_with_includes(manager, task)), task


def _with_includes(manager, task):
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(manager.task_index[task].yaml_path, resolve_func=False)
