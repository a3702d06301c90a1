"""The house rules of ARCHITECTURE.md that a machine can check."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "spin_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
VENDORS = {
    "vllm": ("sampler/", "transport/", "bench/script_way.py"), "deepspeed": ("learner/",), "peft": ("learner/adapter.py", "bench/contestants.py"), "bitsandbytes": ("learner/quantized.py",), "ray.train": ("learner/",), "wandb": ("tracking.py",), "optuna": ("study/",), "omegaconf": ("config/",), "lm_eval": ("tasks/",),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("vendor", VENDORS)
def test_one_vendor_one_place(vendor):
    users = {str(path.relative_to(PACKAGE)) for path in FILES if any(f"{name}.".startswith(f"{vendor}.") for name in imports(path))}
    assert users and all(user.startswith(VENDORS[vendor]) for user in users), users


LAYERS = [
    ("errors.py", "families.py", "__init__.py", "demo/__init__.py", "exchange/__init__.py", "bench/__init__.py", "imports.py", "hub.py"),
    ("config/",),
    ("background.py", "storage.py", "spool.py"),
    ("records.py", "lengths.py", "tokenizer.py", "rendering.py", "markers.py", "leftout.py", "template.py", "chat.py", "tokenproof.py", "data/", "losses.py", "methods/", "heldout.py", "stop.py", "manifest.py",
     "chatter.py", "placement.py", "nodes.py", "terminal.py", "tracking.py",
     "model.py", "system.py", "lock.py", "overlap.py", "timeline.py", "interrupt.py", "exits.py",
     "places.py", "address.py", "turns.py", "room.py", "scaling.py", "provenance.py"),
    ("exchange/weights.py", "exchange/adapters.py", "exchange/audit.py"), ("transport/",), ("sampler/",), ("learner/",), ("exchange/pairs.py",),
    ("theta.py", "ending.py"), ("preflight.py",), ("prepared.py",), ("tasks/",),
    ("card.py", "look/__init__.py", "look/stored.py", "look/report/"), ("pages.py",), ("evaluation.py", "guard.py", "reporting.py"), ("opponent.py", "players.py"),
    ("selfplay.py",), ("demo/tasks.py",), ("study/",),
    ("look/",),
    ("bench/",), ("__main__.py", "submit.py", "demo/build.py", "demo/real.py"),
]


def layer(name: str) -> int:
    places = [k for k, prefixes in enumerate(LAYERS) if name.startswith(prefixes)]
    assert places, f"{name} has no layer; give it one here"
    return places[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    own = layer(str(path.relative_to(PACKAGE)))
    for name in imports(path):
        if name.startswith("spin_ray."):
            target = name.removeprefix("spin_ray.").replace(".", "/")
            target += ".py" if (PACKAGE / f"{target}.py").exists() else "/__init__.py"
            assert layer(target) <= own, f"{path.name} imports {name}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_error_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} bare except"
            assert not all(isinstance(statement, ast.Pass) for statement in node.body), f"{path.name}:{node.lineno} swallows an error"


def test_nobody_writes_to_a_config():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                assert not ast.unparse(target).startswith(("config.", "self._config.")), f"{path.name}:{node.lineno} writes to the config"
