"""The command line as a user runs it: real Ray, vLLM, DeepSpeed and W&B on the embedded model, on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.heldout import OF_BEFORE
from spin_ray.records import PAIR_SCHEMA, Pair, from_table
from spin_ray.timeline import read_spans

ROOT = Path(__file__).parents[2]
SMALL = [
    "spin.num_iterations=2", "spin.num_epochs=1", "data.max_prompts=40", "data.max_eval_prompts=24",
    "sampler.block_prompts=16", "learner.batch_pairs=16",
]


TWO = ["sampler.num_replicas=2", "sampler.temperature=0"]


def spin_ray(*arguments: str, timeout: int = 1800) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "spin_ray", *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def run_small(runs: Path, name: str, *more: str, **options) -> subprocess.CompletedProcess:
    return spin_ray("run", "conf/demo.yaml", f"run.dir={runs}", f"run.name={name}", *SMALL, *more, **options)


def manifest(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]


def metrics(run: Path, key: str) -> list:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def snapshot(run: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file of a run but its logs and its lock."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "lock" and "logs" not in path.relative_to(run).parts]
    return {str(path.relative_to(run)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of two iterations, in stream, with two sampler replicas and greedy answers."""
    runs = tmp_path_factory.mktemp("runs")
    done = run_small(runs, "two", *TWO)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    assert "finished: the model is" in done.stdout and "match T=1" in done.stdout
    for noise in ("WARNING", "INFO", "vllm", "deepspeed", "raylet"):
        assert noise not in done.stdout + done.stderr, f"{noise} on the user's terminal"
    return runs / "two"


def test_outputs_are_all_there(finished):
    stages = [mark["stage"] for mark in manifest(finished)]
    told = [stage for stage in stages if stage not in ("checksums", "evaluation", "session", "theta_0")]
    assert told == ["prepared", "iteration", "iteration", "finished"] and stages.count("session") == stages.count("theta_0") == 1
    assert [mark["version"] for mark in manifest(finished) if mark["stage"] == "evaluation"] == [0, 1, 2]
    assert stages.count("checksums") == 2 and stages[-1] == "finished"
    for name in ("config.json", "metrics.jsonl", "logs/sampler-0.log", "logs/sampler-1.log", "logs/learner-0.log", "logs/driver.log"):
        assert (finished / name).stat().st_size > 0, name
    assert list(finished.glob("wandb/offline-run-*/run-*.wandb"))
    assert all((finished / f"iter_00{t}/model/model.safetensors").is_file() for t in (0, 1))
    assert (finished / "iter_001/checkpoint/state").is_dir() and not (finished / "iter_000/checkpoint").exists()  # only the newest


def test_people_find_a_report_a_table_and_model_cards(finished):
    page = (finished / "report.html").read_text()
    assert "theta_2" in page and len(page) < 5e6 and '"rows":[{"prompt":' in page
    header, *rows = (finished / "table.txt").read_text().splitlines()
    assert "exact_match_t1_share_se" in header and [row.split()[0] for row in rows] == ["SFT", "theta_1", "theta_2"]
    for t in (0, 1):
        _, metadata, text = (finished / f"iter_00{t}/model/README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(metadata)["library_name"] == "transformers"
        assert f"theta_{t + 1} | " in text and f"theta_{t + 2} | " not in text  # no version knows a later one
        made = [mark for mark in manifest(finished) if mark["stage"] == "iteration"][t]
        assert made["pairs"]["sha256"] in text and made["pairs"]["new"] == 40 and made["sampling"]["temperature"] == 0


def test_more_iterations_may_be_asked_of_a_finished_run(finished):
    run = finished.parent / "more"
    shutil.copytree(finished, run)
    (run / "config.json").write_text((run / "config.json").read_text().replace('"name": "two"', '"name": "more"'))
    before = snapshot(run)
    done = run_small(finished.parent, "more", *TWO, "spin.num_iterations=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [mark["stage"] for mark in manifest(run) if mark["stage"] in ("iteration", "finished", "extended")] == [
        "iteration", "iteration", "finished", "extended", "iteration", "finished"]
    assert [mark["report"]["first_loss"] for mark in manifest(run) if mark["stage"] == "iteration"] == pytest.approx([0.693147] * 3, abs=1e-4)
    after = snapshot(run)
    assert all(after[name] == fact for name, fact in before.items() if name.startswith(("iter_000/pairs", "iter_001/pairs", "iter_000/model/model")))
    again = run_small(finished.parent, "more", *TWO, "spin.num_iterations=3")
    assert again.returncode == 0 and "is finished" in again.stdout
    fewer = run_small(finished.parent, "more", *TWO)
    assert fewer.returncode == 2 and "spin.num_iterations: 3 -> 2" in fewer.stderr


def test_a_manifest_repeats_its_run(finished):
    done = spin_ray("run", "--from-manifest", finished / "manifest.jsonl", "run.name=repeated", "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("finished: the model is") and done.stdout.count("\n") == 1
    runs = finished, finished.parent / "repeated"
    made = [[mark for mark in manifest(run) if mark["stage"] == "iteration"] for run in runs]
    assert [mark["pairs"] for mark in made[0]] == [mark["pairs"] for mark in made[1]]  # greedy
    inputs = [{mark["stage"]: mark.get("sha256") or mark.get("template") for mark in manifest(run) if mark["stage"] in ("prepared", "theta_0", "session")} for run in runs]
    assert inputs[0] == inputs[1]
    itself = spin_ray("run", "--from-manifest", finished / "manifest.jsonl")
    assert itself.returncode == 2 and "that is the run itself" in itself.stderr
    other = spin_ray("run", "--from-manifest", finished / "manifest.jsonl", "run.name=other", "data.max_prompts=39")
    assert other.returncode == 2 and "data.train, data.max_prompts" in other.stderr


def test_pairs_have_their_schema_and_versions_without_gap_or_duplicate(finished):
    def rows(pattern):
        return [row for path in sorted(finished.glob(pattern)) for row in pq.read_table(path).to_pylist()]

    for t in (0, 1):
        new = rows(f"iter_00{t}/pairs/block_*.parquet")
        assert sorted(row["prompt_id"] for row in new) == list(range(40))
        assert {(row["iteration"], row["opponent_version"], row["scored_version"]) for row in new} == {(t, t, t)}
    replayed, written = rows("iter_001/pairs/replay_*.parquet"), rows("iter_000/pairs/block_*.parquet")
    assert {(row["iteration"], row["opponent_version"], row["scored_version"]) for row in replayed} == {(1, 0, 1)}
    assert [row["generated_ids"] for row in replayed] == [row["generated_ids"] for row in written]
    assert [row["opponent_real_logps"] for row in replayed] != [row["opponent_real_logps"] for row in written]
    assert list(written[0]) == [
        "prompt_id", "iteration", "opponent_version", "scored_version", "prompt_ids", "real_ids", "generated_ids",
        "opponent_real_logps", "opponent_generated_logps", "finish_reason", "opponent_steps_early", "scored_steps_early", "anchor_ids",
        "opponent_anchor_logps",
    ]
    assert {(row["opponent_steps_early"], row["scored_steps_early"]) for row in written + replayed} == {(0, 0)}
    for row in written + replayed:
        assert len(row["opponent_generated_logps"]) == len(row["generated_ids"]) and len(row["opponent_real_logps"]) == len(row["real_ids"])
        assert (row["generated_ids"][-1] == 1) == (row["finish_reason"] == "stop") and row["real_ids"].count(1) == 1


def test_first_loss_of_every_iteration_is_ln_2_and_the_audit_agrees(finished):
    firsts = [mark["report"]["first_loss"] for mark in manifest(finished) if mark["stage"] == "iteration"]
    assert firsts == pytest.approx([0.693147] * 2, abs=1e-4)
    assert len(metrics(finished, "audit/mean_abs_logp_difference_nats")) == 3
    assert max(metrics(finished, "audit/max_abs_logp_difference_nats")) < 1e-3


def test_replay_doubles_the_pairs_of_iteration_1(finished):
    assert [mark["report"]["num_pairs"] for mark in manifest(finished) if mark["stage"] == "iteration"] == [40, 80]


def test_promised_metrics_are_logged(finished):
    for key in (
        "train/loss", "train/margin", "train/accuracy", "train/real_logp_change_nats", "train/generated_logp_change_nats", "train/grad_norm",
        "train/lr", "train/pairs_per_s", "train/waited_s", "sampler/tokens_per_s", "sync/load_s", "sync/gib_per_s",
        "audit/mean_abs_logp_difference_nats", "audit/first_loss_deviation", "iteration/learner_idle_share", "train/stale_share", "eval/real_nll_nats_per_token", "eval/exact_match_t1_share", "eval/exact_match_greedy_share",
        "eval/generated_tokens", "eval/truncated_share", "eval/same_as_real_share", "train/pair_loss", "train/lower_likelihood_share",
        "train/generated_tokens", "iteration/last_epoch_accuracy", "eval/kl_from_start_nats_per_token",
    ):
        assert metrics(finished, key), key
    assert len(metrics(finished, "eval/exact_match_t1_share")) == 3 and len(metrics(finished, "eval/advantage_accuracy")) == 2
    for histogram in metrics(finished, "iteration/last_epoch_margin_histogram"):
        assert sum(histogram) == pytest.approx(1) and len(histogram) == 10


def test_every_metric_is_in_the_docs(finished):
    """docs/metrics.md has each with its unit and healthy range."""
    docs = (ROOT / "docs/metrics.md").read_text()
    logged = {key for line in (finished / "metrics.jsonl").read_text().splitlines() for key in json.loads(line) if "/" in key}
    group = {name: docs.split(f"## {name}")[1].split("\n## ")[0] for name in ("train", "iteration", "eval", "audit")}
    for key in logged:
        section, name = key.split("/")
        name = name.removesuffix("_se")
        documented = group.get(section, group["audit"])
        assert f"`{name}`" in documented or f"`{key}`" in documented or (name.startswith("last_epoch_") and "`last_epoch_*`" in documented), key


def test_the_held_out_advantage_is_what_the_answers_on_disk_and_the_models_give(finished):
    """Of theta_1 over theta_0, by transformers: r(y) - r(y') from the two exported models."""
    pairs = from_table(pq.read_table(finished / "heldout/theta_000.parquet").select(PAIR_SCHEMA.names).cast(PAIR_SCHEMA), Pair)
    lm = AutoModelForCausalLM.from_pretrained(finished / "iter_000/model", dtype=torch.float32)

    def logp(pair, answer):
        ids = torch.tensor(np.concatenate([pair.prompt_ids, answer])[None].astype(np.int64))
        logps = torch.log_softmax(lm(ids).logits[0, len(pair.prompt_ids) - 1 : -1], -1)
        return logps.gather(1, torch.tensor(answer[:, None].astype(np.int64))).sum().item()

    with torch.no_grad():
        gained = np.array([
            logp(p, p.real_ids) - p.opponent_real_logps.sum() - logp(p, p.generated_ids) + p.opponent_generated_logps.sum() for p in pairs
        ])
        kept = pq.read_table(finished / "heldout/theta_001.parquet").column(OF_BEFORE).to_pylist()
        assert [sum(row) for row in kept] == pytest.approx([logp(p, p.generated_ids) for p in pairs], abs=1e-3)
    same = np.array([np.array_equal(p.real_ids, p.generated_ids) for p in pairs])
    assert len(pairs) == 24 and metrics(finished, "eval/advantage_nats")[0] == pytest.approx(gained.mean(), abs=1e-3)
    assert metrics(finished, "eval/advantage_accuracy")[0] == pytest.approx(np.where(same, 0.5, gained > 0).mean(), abs=1e-6)


def test_the_best_version_is_named(finished):
    shares = metrics(finished, "eval/exact_match_t1_share")
    best = max(range(3), key=lambda version: (shares[version], -version))
    assert (finished / "best").read_text().strip() == (str(finished / f"iter_00{best - 1}/model") if best else "demo:sft")


def test_exported_model_loads_in_transformers_and_gives_the_sampler_s_numbers(finished):
    """iter_000/model is theta_1, which scored iteration 1's pairs in vLLM."""
    model = AutoModelForCausalLM.from_pretrained(finished / "iter_000/model", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(finished / "iter_000/model").chat_template
    for row in pq.read_table(finished / "iter_001/pairs/block_00000.parquet").to_pylist()[:4]:
        ids = torch.tensor([row["prompt_ids"] + row["generated_ids"]])
        logps = torch.log_softmax(model(ids).logits[0], -1)[len(row["prompt_ids"]) - 1 : -1]
        expected = logps.gather(1, torch.tensor(row["generated_ids"])[:, None])[:, 0].detach()
        np.testing.assert_allclose(row["opponent_generated_logps"], expected, atol=1e-4)


def test_second_run_of_the_same_command_changes_nothing(finished):
    before = snapshot(finished)
    again = run_small(finished.parent, "two", *TWO)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert snapshot(finished) == before


def test_other_config_is_refused_with_the_difference(finished):
    refused = run_small(finished.parent, "two", *TWO, "spin.beta=0.5")
    assert refused.returncode == 2 and "spin.beta: 0.1 -> 0.5" in refused.stderr


def test_unfinished_run_goes_on_where_it_was(finished):
    """Take away what iteration 1 and later left, all but one of its blocks: the rest is done again, the block is not."""
    run = finished.parent / "resumed"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    config["run"]["name"] = "resumed"
    (run / "config.json").write_text(json.dumps(config))
    prepared, iteration = (next(mark for mark in manifest(run) if mark["stage"] == stage) for stage in ("prepared", "iteration"))
    # killed with the evaluation of theta_0 put off and a line half written
    (run / "manifest.jsonl").write_text("".join(json.dumps(mark) + "\n" for mark in (prepared, iteration)) + '{"stage": "evalu')
    shutil.rmtree(run / "iter_001/model")
    shutil.rmtree(run / "iter_001/checkpoint")
    for path in run.glob("iter_001/pairs/*.parquet"):
        if path.name != "block_00000.parquet":
            path.unlink()
    done_before = ("iter_000/pairs", "iter_000/model", "iter_001/pairs/block_00000.parquet")
    kept = {name: stat for name, stat in snapshot(run).items() if name.startswith(done_before)}
    done = run_small(finished.parent, "resumed", *TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    after = snapshot(run)
    assert {name: after[name] for name in kept} == kept
    assert [mark["stage"] for mark in manifest(run) if mark["stage"] in ("iteration", "finished")] == ["iteration", "iteration", "finished"]
    first_losses = [mark["report"]["first_loss"] for mark in manifest(run) if mark["stage"] == "iteration"]
    assert first_losses[1] == pytest.approx(0.693147, abs=1e-4)
    name = "real_nll_nats_per_token"
    nll = [[mark["metrics"][name] for mark in manifest(folder) if mark["stage"] == "evaluation"] for folder in (finished, run)]
    assert len(nll[1]) == 3 and nll[1][:2] == pytest.approx(nll[0][:2], abs=1e-5)  # theta_0 came back to be evaluated
    assert (run / "wandb_id").read_text() == (finished / "wandb_id").read_text()


def test_timeline_shows_both_players(finished):
    spans = read_spans(finished)
    assert {span.player for span in spans} == {"main player", "opponent 0", "opponent 1"}
    assert {"train", "publish", "save", "score", "play", "evaluate", "load", "audit"} == {span.activity for span in spans}
    assert (finished / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_sequential_with_one_replica_and_the_learner_as_scorer_gives_the_same_run(finished):
    """Overlap, number of replicas and who computes the references change nothing but float noise."""
    done = run_small(finished.parent, "sequential", "sampler.temperature=0", "overlap.mode=sequential", "reference.scorer=learner")
    assert done.returncode == 0, done.stderr[-3000:]
    other = finished.parent / "sequential"
    for path in sorted(finished.glob("iter_*/pairs/*.parquet")):
        left, right = pq.read_table(path), pq.read_table(other / path.relative_to(finished))
        for column in ("prompt_id", "opponent_version", "generated_ids"):
            assert left.column(column).to_pylist() == right.column(column).to_pylist(), path
        assert all(logps == [] for logps in right.column("opponent_real_logps").to_pylist())
    assert_models_are_alike(finished, other)
    train_spans = [span for span in read_spans(other) if span.activity == "train" and span.iteration == 0]
    played = max(span.end for span in read_spans(other) if span.activity == "play" and span.iteration == 0)
    assert max(span.end for span in train_spans) > played and metrics(other, "train/waited_s")[0] > 0


def test_players_that_take_turns_make_the_same_run(finished):
    """On a CPU for real, with sleeps that free nothing."""
    done = run_small(finished.parent, "shared", *TWO, "placement.mode=shared")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "take turns on the same devices (placement.mode), so overlap.mode is sequential" in done.stdout
    other = finished.parent / "shared"
    for path in sorted(finished.glob("iter_*/pairs/*.parquet")):
        left, right = pq.read_table(path), pq.read_table(other / path.relative_to(finished))
        for column in ("prompt_id", "opponent_version", "generated_ids"):
            assert left.column(column).to_pylist() == right.column(column).to_pylist(), path
        for column in ("opponent_real_logps", "opponent_generated_logps"):
            for ours, theirs in zip(left.column(column).to_pylist(), right.column(column).to_pylist(), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert_models_are_alike(finished, other)
    spans = read_spans(other)
    assert {"sleep", "wake", "rest"} <= {span.activity for span in spans}
    played = [(span.begin, span.end) for span in spans if span.activity in ("play", "evaluate", "load", "audit")]
    learnt = [(span.begin, span.end) for span in spans if span.activity in ("train", "publish", "save", "score")]
    assert not any(begin < end_2 and begin_2 < end for begin, end in played for begin_2, end_2 in learnt)


def assert_models_are_alike(left, right):
    for t in (0, 1):
        theirs = load_file(right / f"iter_00{t}/model/model.safetensors")
        for name, weight in load_file(left / f"iter_00{t}/model/model.safetensors").items():
            # Adam turns rounding noise in a gradient that is almost 0 into a whole step: the mean, far below one step of 3e-4.
            assert (weight - theirs[name]).abs().mean() < 1e-5, name


def test_own_model_and_data_lookahead_frozen_two_workers(tiny_model, tmp_path):
    """A user's own JSONL, template and untied model, all by relative paths; lookahead, references by a frozen copy, two ZeRO-3 workers."""
    model = os.path.relpath(tiny_model(tied=False))
    template = os.path.relpath(shutil.copy(Path(model, "chat_template.jinja"), tmp_path / "own.jinja"))
    rows = [{"prompt": f"What is {k}?", "response": f"It is {k}."} for k in range(24)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = spin_ray(
        "run", "conf/demo.yaml", f"run.dir={tmp_path}", "run.name=own", f"model.path={model}", f"model.chat_template={template}",
        f"data.train={os.path.relpath(tmp_path / 'own.jsonl')}", "data.eval=''", "learner.num_workers=2", "learner.zero_stage=3", "learner.batch_pairs=8", "spin.num_iterations=2", "spin.num_epochs=2", "sampler.block_prompts=8",
        "overlap.mode=lookahead", "overlap.lookahead_fraction=0.3", "reference.scorer=frozen",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [mark["report"] for mark in manifest(tmp_path / "own") if mark["stage"] == "iteration"]
    assert [report["num_pairs"] for report in reports] == [2 * 24, 2 * 48]
    assert [report["first_loss"] for report in reports] == pytest.approx([0.693147] * 2, abs=1e-4)  # frozen scores stale pairs under theta_1
    early = [pq.read_table(tmp_path / f"own/iter_001/pairs/block_0000{k}.parquet").column("opponent_steps_early").to_pylist() for k in range(3)]
    assert early == [[2] * 8, [0] * 8, [0] * 8]  # 6 steps, 0.3 of them; the first of three blocks
    assert metrics(tmp_path / "own", "train/stale_share")[:7] == [0.0] * 6 + [1.0] and max(metrics(tmp_path / "own", "train/max_staleness_steps")) == 2


def test_sft_then_eval(tmp_path):
    common = [f"run.dir={tmp_path}", "data.max_eval_prompts=16"]
    trained = spin_ray("sft", "conf/demo_sft.yaml", *common, "run.name=sft", "data.max_prompts=64", "sft.num_epochs=2")
    assert trained.returncode == 0, trained.stderr[-3000:]
    nll = metrics(tmp_path / "sft", "train/real_nll_nats_per_token")
    assert len(nll) == 4
    judged = spin_ray("eval", "conf/demo.yaml", *common, "run.name=eval", f"model.path={tmp_path}/sft/iter_000/model")
    assert judged.returncode == 0, judged.stderr[-3000:]
    found = json.loads(judged.stdout)  # nothing else stands there
    assert judged.stderr.startswith("the proof at the door holds (") and judged.stderr.count("\n") == 1
    assert found["num_prompts"] == 16 and 0 < found["real_nll_nats_per_token"] < 3


BAD_INPUT = {
    "no_model": (["model.path=/no/such/model"], "model.path=/no/such/model: no such folder; give one with a model"),
    "no_data": (["data.train=/no/such.jsonl"], "no such file"),
    "typo": (["spin.betta=1"], "nearest known key is spin.beta"),
    "batch": (["learner.num_workers=3"], "32 = 10 × 3 + 2"),
    "too_many": (["sampler.num_replicas=99"], "this run needs 50.4 = 99 samplers × 0.5"),
    "too_long": (["sampler.max_new_tokens=5000"], "the model has 256 positions"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path):
    overrides, message = BAD_INPUT[case]
    refused = spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", f"run.name={case}", *overrides, timeout=600)
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert message in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


def test_vocabularies_that_disagree_and_missing_template_are_refused(tiny_model, tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny_model(tied=True), folder)
        change(folder)
        return spin_ray("run", "conf/demo.yaml", f"run.dir={tmp_path}", f"run.name=r_{name}", f"model.path={folder}", timeout=600)

    def shrink(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))

    refused = broken("vocabulary", shrink)
    assert refused.returncode == 2 and "the model has 100 rows for tokens" in refused.stderr
    refused = broken("template", lambda folder: (folder / "chat_template.jinja").unlink())
    assert refused.returncode == 2 and "no chat template" in refused.stderr
