"""What the documents say exists: commands, keys, files, links. tests/local/test_new_user.py runs the commands."""

import re
import shlex
from pathlib import Path

import pytest

from spin_ray.__main__ import BENCHES, COMMANDS, parsed
from spin_ray.config import Config, flatten, load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = flatten(Config())
STANDS_FOR = {"CONFIG": "conf/demo.yaml", "[CONFIG]": "conf/demo.yaml", "RUN": "runs/demo", "SEARCH": "conf/search/lr_beta.yaml", "NAME": "learner", "FILE": "runs/demo/manifest.jsonl", "...": ""}
FILES = (".py", ".md", ".yaml", ".sh", ".html", ".jsonl", ".css", ".js", ".safetensors", ".json", ".png")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page):
    """Every `spin-ray ...` of a page, in code: its words, placeholders filled in."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    code = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in code for line in block.splitlines()] + re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in lines:
        found = re.match(r"(?:\.venv/bin/)?(?:spin-ray|python -m spin_ray) +(.*)", " ".join(line.split()))
        if found:
            words = [STANDS_FOR.get(word, word) for word in shlex.split(found[1].split("  #")[0], comments=True)]
            yield [word.replace("=...", "=x") for word in words if word]


@pages
def test_every_command_parses_and_its_settings_exist(page):
    for words in commands(page):
        if words[0] == "bench":
            assert words[1] in BENCHES, words
            continue
        assert words[0] in COMMANDS, words
        if len(words) == 1:
            continue  # the name of a command, not a call
        args = parsed(words)
        config = getattr(args, "config", None)
        if config and args.command != "tune":
            given = [*args.overrides, *(f"{key}=x" for key in ("model.path", "data.train") if config == "conf/own.yaml")]
            load_config(ROOT / config, [re.sub(r"=[A-Z]$", "=1", word) for word in given])


@pages
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            heads = {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in re.findall(r"^#+ (.*)$", linked.read_text(), re.M)}
            assert anchor in heads, target


@pages
def test_every_setting_that_is_named_exists(page):
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    for key in re.findall(r"`([a-z0-9_]+(?:\.[a-z0-9_]+)+)(?:=[^`]*)?`", page.read_text()):
        if key.partition(".")[0] in sections and not key.endswith(FILES):
            assert key in KEYS or any(known.startswith(f"{key}.") or key.startswith(f"{known}.") for known in KEYS), key


@pages
def test_every_file_of_ours_that_is_named_exists(page):
    for name in re.findall(r"`((?:spin_ray|conf|cluster|tests|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_readme_is_short_and_shows_a_report():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150 and "(docs/report.png)" in text and (ROOT / "docs/report.png").stat().st_size > 10_000


def test_every_metric_that_a_run_logs_is_documented():
    """Names that the code gives to `Tracker.log`, as far as they are written in one place."""
    text = (ROOT / "docs/metrics.md").read_text()
    heldout = (ROOT / "spin_ray/heldout.py").read_text()
    for name in set(re.findall(r'"(\w+_(?:nats|share|accuracy|token|tokens|change))"', heldout)):
        assert name in text, name


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`spin-ray {name}" not in text] == []
