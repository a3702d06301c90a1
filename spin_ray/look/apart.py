"""A check of `spin-ray doctor` in a process of its own: `python -m spin_ray.look.apart NAME ANSWER FOLDER [CONFIG key=value ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spin_ray.config import Config, load_config
from spin_ray.errors import BadInput, RunStopped
from spin_ray.exits import why_it_ends
from spin_ray.look.checks import ERROR, Found, Subject, write_answer
from spin_ray.look.doctor import CHECKS, OF_A_CONFIG


def main(words: Sequence[str]) -> int:
    """Writes the findings; what is raised is one of them, and its traceback goes to the log."""
    name, answer, folder, *config = words
    check = next(check for check in (*CHECKS, *OF_A_CONFIG) if check.name == name)
    subject = Subject(
        load_config(config[0], config[1:])[0] if config else Config(), bool(config), tuple(config), Path(folder),
        joins=bool(os.environ.get("RAY_ADDRESS")),
    )
    found: list[Found] = []
    try:
        found.extend(check.work(subject))
    except BaseException as error:
        write_answer(Path(answer), [*found, Found(ERROR, why_it_ends(error))])
        if not isinstance(error, (BadInput, RunStopped)):
            raise
    else:
        write_answer(Path(answer), found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
