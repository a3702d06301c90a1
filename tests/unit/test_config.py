"""Config: typos fail with the nearest right name, values are checked with their arithmetic, every shipped file loads."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spin_ray.config import Config, RunConfig, at, differences, flatten, load_config, to_json
from spin_ray.demo import resolve
from spin_ray.errors import BadInput

CONF = Path(__file__).parents[2] / "conf"
GIVEN = ["model.path=some/model", "data.train=some.jsonl"]


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: some/model}\ndata: {train: some.jsonl}\n")
    return path


def test_contract_keys_exist():
    promised = """run.name run.dir run.seed model.path model.dtype data.train data.eval data.max_prompt_tokens spin.num_iterations
    spin.num_epochs spin.beta spin.lr spin.replay spin.nll_weight sampler.num_replicas sampler.tensor_parallel_size sampler.temperature
    sampler.max_new_tokens sampler.block_prompts learner.num_workers learner.batch_pairs learner.zero_stage learner.optimizer
    learner.warmup_fraction reference.scorer overlap.mode tracking.wandb.mode sampler.gpus_per_replica learner.gpus_per_worker"""
    assert set(promised.split()) <= flatten(Config()).keys()


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_holds_only_what_differs(path):
    config, origin = load_config(path, GIVEN if path.name == "own.yaml" else GIVEN[1:] if path.stem.endswith("_1gpu") else ())
    values, defaults = flatten(config), flatten(Config())
    same = [key for key, source in origin.items() if source == str(path) and values[key] == defaults[key]]
    assert not same, f"{path.name} repeats defaults: {same}"


def test_origins(minimal):
    config, origin = load_config(minimal, ["spin.beta=[0.1, 0.1, 0.1, 5.0]", "sampler.gpus_per_replica=null"])
    assert [at(config.spin, t).beta for t in range(4)] == [0.1, 0.1, 0.1, 5.0] and at(config.spin, 3).lr == 5e-7
    assert (origin["model.path"], origin["spin.beta"], origin["run.seed"]) == (str(minimal), "command line", "default")


@pytest.mark.parametrize("override, message", [
    ("spin.betta=1", "unknown key spin.betta; the nearest known key is spin.beta"),
    ("learner.batchpairs=8", "the nearest known key is learner.batch_pairs"),
    ("spin=3", "unknown key spin"),
    ("spin.num_epochs=two", "spin.num_epochs=two: must be a whole number of at least 1"),
    ("spin.num_epochs=1.5", "spin.num_epochs=1.5: must be a whole number of at least 1"),
    ("sampler.temperature=[1, 1, 1]", "sampler.temperature has 3 values for 4 iterations"),
    ("sampler.temperature=-1", "sampler.temperature=-1: must be a number of at least 0"),
    ("spin.nll_weight=[0, 0, 0, -1]", "spin.nll_weight=[0, 0, 0, -1]: must be a number of at least 0"),
    ("dpo.beta=[0.1, 0.2]", "dpo.beta has 2 values for 1 iterations"),
    ("method=ppo", "choose one of spin, sft, dpo"),
    ("spin.replay=true", "spin.replay"),
    ("spin.num_epochs=0", "spin.num_epochs=0: must be a whole number of at least 1"),
    ("spin.beta=[0.1, 0.2]", "spin.beta has 2 values for 4 iterations"),
    ("spin.lr=-1", "spin.lr=-1: must be a number above 0"),
    ("spin.lr=.nan", "spin.lr=nan: must be a number above 0"),
    ("learner.num_workers=3", "64 = 21 × 3 + 1"),
    ("learner.optimizer=sgd", "choose one of rmsprop, adamw"),
    ("overlap.mode=fast", "choose one of stream, sequential, lookahead"),
    ("overlap.lookahead_fraction=1", "must be in (0, 1)"),
    ("guard.rollback_lr_factor=1", "guard.rollback_lr_factor=1.0: must be in (0, 1)"),
    ("guard.on_divergence=hope", "choose one of stop, rollback"),
    ("guard.num_answers=0", "must be at least 1"),
    ("run.keep_checkpoints=0", "must be at least 1"),
    ("run.keep_pairs_iterations=-1", "must not be negative"),
    ("model.path=''", "model.path is not set"),
    ("run.name=a/b", "plain folder name"),
    ("run.name=..", "plain folder name"),
    ("run.dir=s3:/bucket", "a URL begins with s3://"),
    ("sft.lr=-1", "sft.lr=-1: must be a number above 0"),
    ("sampler.gpu_memory_utilization=3", "must be in (0, 1]"),
    ("beta", "form key=value"),
    ("=3", "form key=value"),
    ("data.ignore_columns=notes", "a list is written key=[a,b]"),
    ("run.name=[a", "command line: run.name=[a: not a value in YAML"),
    ("run.name=\udcff", "command line: run.name=\\udcff: not a value in YAML"),
])
def test_bad_values_get_one_clear_line(minimal, override, message):
    with pytest.raises(BadInput) as caught:
        load_config(minimal, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides, message", [
    (["weights.transport=rdma"], "choose one of object_store, nccl, gloo"),
    (["weights.transport=nccl", "lora.rank=8"], "weights.transport=nccl does not go with lora.sync=adapter"),
    (["weights.transport=nccl", "model.adapter=x", "lora.rank=8"], "weights.transport=nccl does not go with lora.sync=adapter"),
    (["weights.transport=gloo", "placement.mode=shared"], "weights.transport=gloo does not go with placement.mode=shared"),
    (["weights.transport=nccl", "weights.timeout_s=4000"], "weights.timeout_s=4000 is longer than sampler.request_timeout_s=1800"),
    (["weights.timeout_s=0"], "weights.timeout_s=0.0: must be at least 1"),
])
def test_what_does_not_go_with_a_transport_is_refused_in_one_line(minimal, overrides, message):
    with pytest.raises(BadInput) as caught:
        load_config(minimal, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    load_config(minimal, ["weights.transport=nccl", "lora.rank=8", "lora.sync=merged"])


@pytest.mark.parametrize("text, given, missing", [
    ((CONF / "own.yaml").read_text(), [], "model.path and data.train are"), ((CONF / "own.yaml").read_text(), GIVEN[:1], "data.train is"),
    ("model: {path: ''}\n", GIVEN[1:], "model.path is"),
    ("run: {name: '???'}\nlearner: {batch_pairs: '???'}\n", GIVEN, "run.name and learner.batch_pairs are"),
])
def test_all_keys_that_are_still_to_be_given_are_named_at_once(tmp_path, text, given, missing):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"own\.yaml: " + missing + r" not set \(\?\?\? there is a placeholder\)") as caught:
        load_config(tmp_path / "own.yaml", given)
    assert "\n" not in str(caught.value)


def test_a_home_s_tilde_is_expanded_wherever_a_path_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == f"{tmp_path}/model" and resolve("owner/name") == "owner/name" and resolve("~nobody-here/x") == "~nobody-here/x"
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("models/mine") == resolve("~/models/mine") == f"{tmp_path}/models/mine"  # a worker is in a folder of its own
    assert Config(run=RunConfig(dir="~/runs", name="a")).run_path == tmp_path / "runs/a"
    assert Config(run=RunConfig(dir="s3://bucket", scratch="~/big")).run_path.is_relative_to(tmp_path / "big")


def test_a_key_without_a_value_is_the_empty_text(minimal):
    assert load_config(minimal, ["data.eval="])[0].data.eval == ""


@pytest.mark.parametrize("text, message", [("- a\n- b\n", "this one holds a list"), ("", "model.path and data.train are not set")])
def test_files_that_are_no_config(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("url", [
    "s3://KEY:hush@bucket/runs", "s3://KEY:hu/sh@bucket/runs", "s3://KEY@bucket", "s3://bucket/runs?access_key=KEY&secret_key=hush",
    "abfs://me:hush@store/runs", "abfs://container@store/runs?sig=hush",
])
def test_credentials_in_a_url_are_refused_and_not_repeated(minimal, url):
    with pytest.raises(BadInput, match=r"run\.dir=\w+://\.\.\.: holds credentials") as caught:
        load_config(minimal, [f"run.dir={url}"])
    assert "hush" not in str(caught.value) and "=KEY" not in str(caught.value)


def test_a_url_is_a_run_dir_and_its_scratch_folder_may_change(minimal):
    url = "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1"
    config, _ = load_config(minimal, [f"run.dir={url}", "run.scratch=/big/disk"])
    assert config.on_object_store and config.run.dir == url
    assert config.run_path.parent.parent == Path("/big/disk") and config.run_path.name == "spin"
    elsewhere, _ = load_config(minimal, ["run.dir=s3://other/runs", "run.scratch=/big/disk"])
    assert elsewhere.run_path != config.run_path and differences(elsewhere, json.loads(to_json(config))) == []
    load_config(minimal, ["run.dir=abfs://container@store.dfs.core.windows.net/runs"])
    with pytest.raises(BadInput, match="give a path on a disk without file://"):
        load_config(minimal, ["run.dir=file:///runs"])


def test_offload_without_zero_is_refused(minimal):
    load_config(minimal, ["learner.offload_optimizer=true"])
    with pytest.raises(BadInput, match=r"needs learner.zero_stage 1, 2 or 3 \(here 0\)"):
        load_config(minimal, ["learner.offload_optimizer=true", "learner.zero_stage=0"])


@pytest.mark.parametrize("overrides, message", [
    (["spin.loss=space", "spin.label_smoothing=0.1"], r"spin.label_smoothing=0.1: spin.loss=space is no function of the margin alone"),
    (["spin.loss=triplet", "spin.positive_weight=1"], r"spin.positive_weight=1.0: spin.loss=triplet is no function"),
    (["spin.loss=triplet", "spin.base_share=0.5"], r"spin.base_share=0.5: spin.loss=triplet has no reference"),
    (["spin.loss=space", "spin.base_share=0.5"], r"spin.base_share=0.5: spin.loss=space takes each answer alone"),
    (["dpo.loss=triplet"], r"dpo.loss=triplet: there is no third answer"),
])
def test_what_means_nothing_beside_a_loss_is_refused(minimal, overrides, message):
    with pytest.raises(BadInput, match=message):
        load_config(minimal, overrides)


def test_a_preset_lies_under_the_file_and_the_command_line(minimal):
    config, origin = load_config(minimal, ["preset=paper", "spin.lr=1e-6"])
    assert config.spin.beta == [0.1, 0.1, 0.1, 5.0] and config.spin.lr == 1e-6
    assert (origin["spin.beta"], origin["spin.lr"], origin["preset"]) == ("preset paper", "command line", "command line")
    minimal.write_text(minimal.read_text() + "preset: careful\nspin: {nll_weight: 0.5}\n")
    config, origin = load_config(minimal)
    assert config.spin.nll_weight == 0.5 and config.spin.stop == "either" and origin["spin.stop"] == "preset careful"
    assert load_config(minimal, ["preset="])[0].spin.stop == "never"
    saved = json.loads(to_json(config))
    assert differences(load_config(minimal, ["preset=", "spin.stop=either"])[0], saved) == []
    with pytest.raises(BadInput, match="preset=bold: choose one of , paper, careful"):
        load_config(minimal, ["preset=bold"])
    with pytest.raises(BadInput, match=r"run\.yaml: model\.path is not set"):
        load_config(minimal, ["preset=paper", "model.path="])


def test_every_scheduled_key_takes_a_value_per_iteration(minimal):
    lists = ["spin.beta=[1, 2]", "spin.lr=[1e-6, 1e-7]", "spin.num_epochs=[2, 1]", "spin.nll_weight=[1, 0]", "sampler.temperature=[1, 0.7]"]
    config, _ = load_config(minimal, ["spin.num_iterations=2", *lists])
    for t, values in enumerate([(1, 1e-6, 2, 1, 1), (2, 1e-7, 1, 0, 0.7)]):
        spin = at(config.spin, t)
        assert (spin.beta, spin.lr, spin.num_epochs, spin.nll_weight, at(config.sampler, t).temperature) == values


def test_unreadable_files(tmp_path):
    with pytest.raises(BadInput, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("run: [1, 2\n")
    with pytest.raises(BadInput, match="not a readable YAML file"):
        load_config(tmp_path / "bad.yaml")


def test_a_key_that_an_earlier_version_did_not_have_counts_as_its_default(minimal):
    config, _ = load_config(minimal)
    saved = json.loads(to_json(config))
    del saved["lora"], saved["model"]["adapter"]
    assert differences(config, saved) == []
    saved["reference"]["scorer"] = "opponent"  # what auto means
    assert differences(config, saved) == []
    assert differences(load_config(minimal, ["reference.scorer=frozen"])[0], saved) == ["reference.scorer: opponent -> frozen"]
    assert differences(load_config(minimal, ["lora.rank=8"])[0], saved) == ["lora.rank: 0 -> 8"]


def test_a_mapping_is_one_value(minimal, tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text(minimal.read_text() + "\nsampler:\n  label_selector:\n    ray.io/accelerator-type: H100\n    pool: b\n")
    config, origin = load_config(path)
    assert config.sampler.label_selector == {"ray.io/accelerator-type": "H100", "pool": "b"} and origin["sampler.label_selector"] == str(path)
    config, origin = load_config(path, ["sampler.label_selector={pool: '!a'}"])
    assert config.sampler.label_selector == {"pool": "!a"} and origin["sampler.label_selector"] == "command line"
    assert load_config(path, ["sampler.label_selector={}"])[0].sampler.label_selector == {}
    assert load_config(minimal)[0].sampler.label_selector == {}
    with pytest.raises(BadInput, match="label_selector"):
        load_config(minimal, ["sampler.label_selector=a"])


def test_differences_ignore_what_does_not_change_the_result(minimal):
    config, _ = load_config(minimal)
    saved = json.loads(to_json(config))
    assert differences(config, saved) == []
    other, _ = load_config(minimal, ["spin.beta=0.2", "tracking.wandb.mode=disabled", "run.dir=/elsewhere", "guard.max_rollbacks=9", "run.keep_checkpoints=3"])
    assert differences(other, saved) == ["spin.beta: 0.1 -> 0.2"]


def test_reading_config_and_help_loads_neither_torch_nor_ray():
    code = "import sys; from spin_ray.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
           "assert not {'torch', 'ray', 'vllm', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_lookahead_refuses_the_scorer_that_waits_for_all_blocks(minimal):
    for scorer, fits in (("opponent", True), ("frozen", True), ("learner", False)):
        overrides = ["overlap.mode=lookahead", f"reference.scorer={scorer}"]
        if fits:
            load_config(minimal, overrides)
        else:
            with pytest.raises(BadInput, match=r"lookahead does not go with reference\.scorer=learner: blocks are played ahead"):
                load_config(minimal, overrides)


@pytest.mark.parametrize("given, complaint", [
    ("0", "must be at least 1"), ("{min: 2, max: 1}", "min is larger than max"), ("{min: 1}", "give a number, or {min: 1, max: 8}"),
    ("1.5", "must be at least 1, a whole number"), ("many", "must be at least 1, a whole number"), ("{min: 0, max: 3}", "must be at least 1"),
])
@pytest.mark.parametrize("key", ["sampler.num_replicas", "learner.num_workers"])
def test_a_number_of_players_that_cannot_be_meant(key, given, complaint):
    with pytest.raises(BadInput, match=re.escape(complaint)):
        load_config("conf/demo.yaml", [f"{key}={given}"])


def test_a_number_of_players_or_two_bounds():
    given = ["sampler.num_replicas={min: 2, max: 5}", "learner.num_workers={min: 3, max: 7}", "sampler.label_selector={pool: a}"]
    for selector in ("{}", "{pool: a}", "{zone: c}"):
        with pytest.raises(BadInput, match="would take the same nodes from each other"):
            load_config("conf/demo.yaml", [*given, f"learner.label_selector={selector}"])
    given.append("learner.label_selector={pool: b}")
    between, _ = load_config("conf/demo.yaml", given)
    assert (between.sampler.fewest, between.sampler.most) == (2, 5) and (between.learner.fewest, between.learner.most) == (3, 7)
    for more, complaint in (("learner.batch_pairs=6", "fewer pairs than"), ("learner.optimizer=adamw_8bit", "its moments cannot be cut")):
        with pytest.raises(BadInput, match=complaint):
            load_config("conf/demo.yaml", [*given, more])
    one, _ = load_config("conf/demo.yaml", ["learner.num_workers={min: 2, max: 2}"])
    assert one.learner.fewest == one.learner.most == 2
