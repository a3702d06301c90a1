"""`spin-ray plan`: print what a run needs, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Sequence

from spin_ray.config import load_config
from spin_ray.look.plan.inputs import Asked
from spin_ray.look.plan.plan import make_plan
from spin_ray.look.plan.text import in_words


def plan(config_path: str, overrides: Sequence[str], asked: Asked, *, as_json: bool) -> None:
    """In words, or as one JSON object. Raises BadInput."""
    made = make_plan(load_config(config_path, overrides)[0], asked)
    print(json.dumps(made.as_json(), indent=2) if as_json else "\n".join(in_words(made)))
