"""Tasks of lm-evaluation-harness, with which published numbers can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from spin_ray.config.keys import at_least
from spin_ray.errors import BadInput


@dataclass
class EvalConfig:
    """What is computed with every version beside the held-out metrics; data.eval has those."""

    tasks: list[str] = field(default_factory=list)
    """Names of the harness' tasks or groups, YAML files, or folders of them; a number behind a colon is the number of examples shown
    before each question: [arc_challenge:25, my_task.yaml]. Empty: none."""
    num_fewshot: int | None = at_least(0, None)
    """Examples before each question, for tasks without a number of their own in eval.tasks; none: what the task itself says."""
    limit: int | None = at_least(1, None)
    """Evaluate on the first so many documents of each task, to try it out; none: all."""
    include_path: str = ""
    """Folder with more tasks that eval.tasks may name; empty: none."""
    max_length: int | None = at_least(2, None)
    """Longest request, in tokens: a question with its answer. Longer ones lose their begin, and are counted; none: as long as the longest
    one, or as the model can read."""
    chat_template: bool = False
    """Ask in the model's chat template."""

    @property
    def wanted(self) -> list[tuple[str, int | None]]:
        """Each task's name, file or folder, and the number of examples that stands behind it."""
        return [_parted(task) for task in self.tasks]

    def check(self) -> None:
        names = [name for name, _ in self.wanted]
        for task, name in zip(self.tasks, names, strict=True):
            if not name or names.count(name) > 1:
                raise BadInput(f"eval.tasks={task}: {'named twice' if name else 'no name'}; give each task once, as NAME or NAME:SHOTS")
        if self.tasks and find_spec("lm_eval") is None:
            raise BadInput("eval.tasks needs the package lm_eval, which is not installed: pip install 'spin-ray[eval]', or make setup")


def _parted(task: str) -> tuple[str, int | None]:
    name, colon, shots = task.rpartition(":")
    return (name, int(shots)) if colon and shots.isdecimal() else (task, None)
