"""What a run was made from, and repeating it by its manifest: the same inputs or a refusal, and told what else is different."""

import json
import subprocess

import numpy as np
import pytest

from spin_ray import provenance
from spin_ray.config import load_config
from spin_ray.errors import BadInput
from spin_ray.exchange.pairs import write_prompts
from spin_ray.manifest import RunDir
from spin_ray.provenance import Origin
from spin_ray.records import PAIR_SCHEMA, Prompt, digest, to_table


def manifest(path, *marks):
    path.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    return path


SESSION = {"stage": "session", "config": {"spin": {"lr": 1.0}}, "packages": {"torch": "0.1"}, "revision": "abc", "template": "t"}


def test_a_manifest_says_what_its_run_was_made_from(tmp_path):
    path = manifest(tmp_path / "m", SESSION, {"stage": "prepared", "sha256": "p"}, {"stage": "theta_0", "sha256": "w"}, {**SESSION, "template": "later"})
    origin = Origin.read(path)
    assert origin.inputs == {"weights": "w", "prompts": "p", "template": "t"} and origin.config == {"spin": {"lr": 1.0}}
    origin.check({"weights": "w", "prompts": "p", "template": "t"})
    origin.check({"weights": "", "prompts": "p", "template": "t"})  # a hub's model that is not here yet
    assert "torch 0.1, here" in origin.other_software() and "spin_ray at abc" in origin.other_software()


@pytest.mark.parametrize("what", ["weights", "prompts", "template"])
def test_other_inputs_are_refused_by_name(tmp_path, what):
    path = manifest(tmp_path / "m", SESSION, {"stage": "prepared", "sha256": "p"}, {"stage": "theta_0", "sha256": "w"})
    found = {"weights": "w", "prompts": "p", "template": "t", what: "other"}
    with pytest.raises(BadInput, match={"weights": "other weights", "prompts": "data.train", "template": "chat template"}[what]):
        Origin.read(path).check(found)


def test_a_run_of_a_version_that_kept_less_is_compared_in_what_it_kept(tmp_path):
    origin = Origin.read(manifest(tmp_path / "m", SESSION, {"stage": "prepared"}))
    assert origin.inputs == {"template": "t"}
    origin.check({"weights": "w", "prompts": "p", "template": "t"})


@pytest.mark.parametrize(("text", "said"), [(None, "no such file"), (b'{"stage": "iteration"}\n', "no line of a session"), (b"hello\n", ":1: no line of a manifest"), (b'{"stage": "session"', "no line of a session")])
def test_what_is_no_manifest_is_told(tmp_path, text, said):
    path = tmp_path / "m"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(BadInput, match=said):
        Origin.read(path)


def prompts(*lengths):
    return [Prompt(k, np.arange(length, dtype=np.int32), np.arange(3, dtype=np.int32) + k) for k, length in enumerate(lengths)]


def written(folder, rows, block):
    config, _ = load_config("conf/demo.yaml", [f"run.dir={folder}"])
    return write_prompts(RunDir(config.run_path), rows, block)[1]


def test_the_prompts_digest_knows_every_token_and_where_answers_begin(tmp_path):
    rows = prompts(4, 7, 2)
    first = written(tmp_path / "a", rows, 2)
    assert first == written(tmp_path / "b", rows, 2)
    moved = [Prompt(0, rows[0].prompt_ids[:3], np.concatenate([rows[0].prompt_ids[3:], rows[0].real_ids])), *rows[1:]]
    others = [rows[::-1], rows[:2], moved, [*rows[:2], Prompt(2, rows[2].prompt_ids, rows[2].real_ids[::-1].copy())]]
    assert len({first, *(written(tmp_path / str(k), other, 2) for k, other in enumerate(others))}) == 1 + len(others)


def test_a_digest_does_not_depend_on_how_a_table_is_cut(make_pairs):
    table = to_table(make_pairs(10), PAIR_SCHEMA)
    import pyarrow as pa

    cut = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    names = ("prompt_id", "generated_ids")
    assert digest(table, names) == digest(cut, names) != digest(table.slice(1), names)


def test_packages_and_revision_are_those_that_are_here():
    found = provenance.packages()
    assert found["torch"].startswith("2.13") and "vllm" in found and "spin_ray" in found
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert head.returncode or provenance.revision().startswith(head.stdout.strip())
