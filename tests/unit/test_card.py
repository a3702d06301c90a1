"""Model cards: what they say of a model is what was true when it was made."""

import json
import threading

import pytest
from made_runs import made_run

from spin_ray.card import card
from spin_ray.config import load_config
from spin_ray.manifest import CARD
from spin_ray.records import Saved
from spin_ray.theta import Thetas


def written(run, version, *overrides):
    config, _ = load_config("conf/demo.yaml", ["run.name=made", f"run.dir={run.path.parent}", *overrides])
    return card(config, run, Thetas(run, config.lora, Saved("base")), version, is_adapter=False)


def test_a_card_tells_of_the_session_that_made_the_model(tmp_path):
    """A run that goes on with other software writes the cards of earlier models anew."""
    run = made_run(tmp_path, finished=False)
    run.mark("session", started=1.8e9, config={}, packages={"torch": "99.0"}, revision="later", template="x" * 64)
    run.mark("iteration", iteration=2, session=2)
    assert "torch 2.13.0" in written(run, 1) and "99.0" not in written(run, 1) and "later" not in written(run, 1)
    assert "torch 99.0" in written(run, 3)


def test_a_run_of_a_version_that_kept_no_sessions_has_cards(tmp_path):
    run = made_run(tmp_path, versions=1, finished=False)
    run.mark("iteration", iteration=0)
    assert "theta_1" in written(run, 1)


@pytest.mark.parametrize(("base", "named"), [("org/name", True), ("gpt2", True), ("demo:sft", False), ("/models/x", False), ("./x", False), ("~/x", False), ("spin_ray", False)])
def test_only_a_name_on_the_hub_is_a_base_there(tmp_path, base, named):
    head = written(made_run(tmp_path, finished=False), 1, f"model.path={base}").split("---")[1]
    assert ("base_model" in head) == named
    for line in head.strip().splitlines():
        json.loads(line.partition(": ")[2])


def test_a_card_that_is_being_written_is_no_part_of_the_weights(tmp_path):
    """A thread digests a model's files while another one writes what people read of it."""
    run, done = made_run(tmp_path, finished=False), threading.Event()
    (model := run.model(0)).mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"x")

    def write():
        while not done.is_set():
            run.storage.put(model / CARD, b"card")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            assert list(run._checksums(0, [model])) == ["model/model.safetensors"]
    finally:
        done.set()
        writer.join()
