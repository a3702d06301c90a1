"""What crosses processes: tables, weight buckets, the audit, the run directory."""

import asyncio
import dataclasses
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from spin_ray.bench import overlap as bench_overlap
from spin_ray.config import Config, DataConfig, ModelConfig, RunConfig
from spin_ray.errors import BadInput
from spin_ray.exchange import pairs as exchange
from spin_ray.exchange.audit import Audit, AuditError, FirstLossError, check_first_loss, compare, pair_mismatch
from spin_ray.exchange.weights import from_bucket, from_folder, to_bucket
from spin_ray.manifest import RunDir
from spin_ray.overlap import BlockSpec
from spin_ray.records import PAIR_SCHEMA, PROMPT_SCHEMA, Completion, Pair, Prompt, Version, from_table, to_table
from spin_ray.storage import ObjectStore, written_whole


def same(left, right):
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None), field.name


def test_pairs_survive_arrow_and_parquet(tmp_path, make_pairs):
    pairs = make_pairs(5)
    exchange.write_table(tmp_path / "b.parquet", to_table(pairs, PAIR_SCHEMA))
    for before, after in zip(pairs, from_table(pq.read_table(tmp_path / "b.parquet").slice(0), Pair), strict=True):
        same(before, after)
    assert [p.name for p in tmp_path.iterdir()] == ["b.parquet"]


def test_prompts_survive_arrow():
    prompts = [Prompt(0, np.array([1, 2], np.int32), np.array([3], np.int32), "x"), Prompt(1, np.array([4], np.int32), np.array([5], np.int32))]
    for before, after in zip(prompts, from_table(to_table(prompts, PROMPT_SCHEMA), Prompt), strict=True):
        same(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bucket_round_trip_with_tied_name(dtype):
    tensors = [("embed", torch.randn(7, 3).to(dtype)), ("norm", torch.randn(5).to(dtype)), ("scalar", torch.tensor(2.0))]
    bucket = to_bucket(tensors)
    for data in bucket.data:
        data.flags.writeable = False  # as it comes out of the object store
    assert bucket.num_bytes == 26 * dtype.itemsize + 4
    found = list(from_bucket(bucket, {"head": "embed"}))
    assert [name for name, _ in found] == ["embed", "head", "norm", "scalar"]
    for (_, expected), (_, value) in zip([tensors[0], *tensors], found, strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected)


def test_a_model_s_folder_gives_each_weight_once_and_a_tied_one_under_both_names(tmp_path):
    embed, norm = torch.randn(7, 3), torch.randn(5)
    save_file({"embed": embed, "norm": norm}, tmp_path / "model.safetensors")
    save_file({"other_format": embed}, tmp_path / "consolidated.safetensors")
    assert sorted(name for name, _ in from_folder(tmp_path, {"head": "embed"})) == ["embed", "head", "norm"]
    save_file({"embed": embed, "head": embed.clone()}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"norm": norm}, tmp_path / "model-00002-of-00002.safetensors")
    files = {name: f"model-0000{part}-of-00002.safetensors" for name, part in (("embed", 1), ("head", 1), ("norm", 2))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = list(from_folder(tmp_path, {"head": "embed"}))
    assert sorted(name for name, _ in found) == ["embed", "head", "norm"]
    assert all(torch.equal(tensor, norm if name == "norm" else embed) for name, tensor in found)


def test_a_model_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--house--small/snapshots/abc"
    snapshot.mkdir(parents=True)
    save_file({"norm": torch.ones(2)}, snapshot / "model.safetensors")
    refs = tmp_path / "models--house--small/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert [(name, tensor.tolist()) for name, tensor in from_folder(Path("house/small"), {})] == [("norm", [1.0, 1.0])]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="house/small: no weights in its"):
        list(from_folder(Path("house/small"), {}))


def test_a_tied_weight_may_have_either_name_but_must_have_one(tmp_path):
    save_file({"head": torch.ones(2), "norm": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert sorted(name for name, _ in from_folder(tmp_path, {"head": "embed"})) == ["embed", "head", "norm"]
    with pytest.raises(RuntimeError, match=r"no \['lm_head'\] in its"):
        list(from_folder(tmp_path, {"lm_head": "embed"}))


def test_audit_reports_and_stops():
    left = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
    right = [np.array([-1.0, -2.3], np.float32), np.array([-3.0], np.float32)]
    audit = compare(3, left, right, tolerance=0.2)
    assert (audit.version, audit.num_tokens) == (3, 3)
    assert audit.mean_nats == pytest.approx(0.1) and audit.max_nats == pytest.approx(0.3)
    assert audit.bias_nats == pytest.approx(0.1) and audit.rms_nats == pytest.approx(0.3 / 3**0.5)
    with pytest.raises(AuditError, match=r"version 3.* 0\.1 nats per token .*largest 0\.3.* tolerance 0\.05"):
        compare(3, left, right, tolerance=0.05)
    with pytest.raises(AuditError):
        compare(3, left, [np.array([np.nan, 0.0]), right[1]], tolerance=0.2)


def test_pair_mismatch_matches_its_worked_number():
    assert pair_mismatch(Audit(0, 0.0, 0.0, 0.0, 0.01, 1), 100) == pytest.approx(0.4)
    assert pair_mismatch(Audit(0, 0.0, 0.0, -0.01, 0.0, 1), 100) == pytest.approx(1.0)


def test_first_loss_is_checked():
    assert check_first_loss(1, 0.6935, expected=0.6931, mismatch=0.0) == pytest.approx(4e-4)
    assert check_first_loss(1, 0.7, expected=0.6931, mismatch=0.04) == pytest.approx(0.0069)
    with pytest.raises(FirstLossError, match=r"iteration 1 is 0\.800000, expected 0\.693100 ± 0\.001000"):
        check_first_loss(1, 0.8, expected=0.6931, mismatch=0.0)
    with pytest.raises(FirstLossError):
        check_first_loss(1, float("nan"), expected=0.6931, mismatch=0.0)


def config(tmp_path, *, method="spin", **run) -> Config:
    return Config(method=method, run=RunConfig(dir=str(tmp_path), name="r", **run), model=ModelConfig(path="m"), data=DataConfig(train="t"))


def test_run_directory_without_work_takes_a_corrected_config(tmp_path):
    RunDir.open(config(tmp_path)).mark("prepared", block_sizes=[1])
    assert RunDir.open(config(tmp_path)).marks("prepared")
    assert RunDir.open(config(tmp_path, seed=1)).marks("prepared") == []


def test_run_directory_with_work_refuses_another_config(tmp_path):
    run = RunDir.open(config(tmp_path))
    run.model(0).mkdir(parents=True)
    assert RunDir.open(config(tmp_path)).marks("iteration") == []
    with pytest.raises(BadInput, match=r"another config \(run.seed: 0 -> 1\)"):
        RunDir.open(config(tmp_path, seed=1))


def test_another_method_is_another_run(tmp_path):
    RunDir.open(config(tmp_path, method="sft")).model(0).mkdir(parents=True)
    with pytest.raises(BadInput, match="method: sft -> spin"):
        RunDir.open(config(tmp_path))


def test_only_one_process_works_on_a_run_and_leftovers_are_removed(tmp_path):
    run = RunDir.open(config(tmp_path))
    (run.path / ".model.123.tmp").mkdir()
    with run.locked():
        assert not (run.path / ".model.123.tmp").exists()
        with pytest.raises(BadInput, match="another process is working on this run"), run.locked():
            pass
        with pytest.raises(BadInput, match="another process is working on this run"):
            RunDir.open(config(tmp_path, seed=1))  # nor may it put its config in place of the owner's
        (run.path / ".block_00004.parquet.17.tmp").touch()  # of a process that died while the run went on
    assert not (run.path / ".block_00004.parquet.17.tmp").exists()
    with run.locked():
        pass


def test_manifest_believes_only_whole_lines(tmp_path):
    run = RunDir.open(config(tmp_path))
    run.mark("iteration", iteration=0)
    with (run.path / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"stage": "iteration", "iter')
    assert run.marks("iteration") == [{"stage": "iteration", "iteration": 0}]


def test_mark_after_a_cut_line_is_believed(tmp_path):
    run = RunDir.open(config(tmp_path))
    (run.path / "manifest.jsonl").write_text('{"stage": "iter')
    run.mark("iteration", iteration=0)
    assert run.marks("iteration") == [{"stage": "iteration", "iteration": 0}]


def test_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file"
    with pytest.raises(RuntimeError), written_whole(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with written_whole(target) as temporary:
            temporary.write_text(content)
    assert target.read_text() == "two"


def test_full_disk_names_the_file_and_leaves_nothing(tmp_path, make_pairs, monkeypatch):
    def full(table, path, **_):
        path.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exchange.pq, "write_table", full)
    with pytest.raises(BadInput, match=r"b\.parquet: cannot be written: No space left on device"):
        exchange.write_table(tmp_path / "b.parquet", to_table(make_pairs(1), PAIR_SCHEMA))
    assert list(tmp_path.iterdir()) == []


def test_block_of_another_version_is_refused(tmp_path, make_pairs):
    plan = exchange.PlayPlan(RunDir(tmp_path), None, None, max_steps_early=2)

    def spec(age, size=3):
        return BlockSpec(1, age, 0, size, Version(1))

    def table(**changes):
        return to_table([dataclasses.replace(pair, iteration=1, scored_version=1, **changes) for pair in make_pairs(3)], PAIR_SCHEMA)

    exchange._check_block(plan, spec(1), table(opponent_version=0))
    exchange._check_block(plan, spec(0), table(opponent_version=1, opponent_steps_early=2))
    for block, found in (
        (spec(0), table(opponent_version=0)), (spec(1, 4), table(opponent_version=0)),
        (spec(0), table(opponent_version=1, opponent_steps_early=3)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            exchange._check_block(plan, block, found)


class CountingPool:
    """Draws y' = (9, 9) and gives every answer token the log-prob of minus its id; counts the prefills."""

    def __init__(self):
        self.num_scored = 0
        self.score = SimpleNamespace(remote=self._score)
        self.sample = SimpleNamespace(remote=self._sample)
        self.play = SimpleNamespace(remote=self._play)

    async def _score(self, version, prompts, answers, *_):
        self.num_scored += len(answers)
        return [-np.asarray(answer, np.float32) for answer in answers]

    async def _play(self, version, prompts, settings, answers, *_):
        return list(zip(await self._sample(version, prompts), await self._score(version, prompts, answers), strict=True))

    async def _sample(self, version, prompts, *_):
        return [Completion(version, np.array([9, 9], np.int32), np.array([-8.5, -8.5], np.float32), "stop") for _ in prompts]


def test_nothing_is_scored_twice(tmp_path):
    """Replay scores y' only where it is not y; new pairs of the same prompts take the real answers' scores from it."""
    run, pool = RunDir(tmp_path), CountingPool()
    plan = exchange.PlayPlan(run, pool, [None] * 3)
    reals = [[3, 4, 5], [9, 9], [6]]
    exchange.write_prompts(run, [Prompt(k, np.array([1, 2], np.int32), np.array(real, np.int32)) for k, real in enumerate(reals)], 3)

    def play(age, t, version):
        pool.num_scored, block = 0, BlockSpec(t, age, 0, 3, version)
        pairs = asyncio.run((exchange.rescore_pairs if age else exchange.sample_pairs)(plan, block))
        for pair in pairs:
            assert np.array_equal(pair.opponent_real_logps, -pair.real_ids)
            if age:
                assert np.array_equal(pair.opponent_generated_logps, -pair.generated_ids)
        exchange.write_table(run.pairs(t, block.kind, 0), to_table(pairs, PAIR_SCHEMA))
        return pool.num_scored

    assert play(0, 0, Version(0)) == 3
    assert play(0, 1, Version(1)) == 3  # no replay yet
    assert play(1, 1, Version(1)) == 5  # of six answers, one is y itself
    assert play(0, 1, Version(1, 4)) == 3  # the snapshot did not score the replay
    assert play(0, 1, Version(1)) == 0
    assert play(1, 2, Version(2)) == 5 and play(2, 2, Version(2)) == 2  # an older replay takes y's scores from the latest
    path = run.pairs(1, "replay", 0)
    exchange.write_table(path, to_table([dataclasses.replace(p, scored_version=0) for p in from_table(pq.read_table(path), Pair)], PAIR_SCHEMA))
    assert play(0, 1, Version(1)) == 3  # scored by another version
    path.write_bytes(b"PAR1 damaged")
    assert play(0, 1, Version(1)) == 3


def test_anchors_are_what_theta_0_answered(tmp_path):
    """A pair that theta_0 wrote has its anchor in y'; so has one whose y' is the same answer. All others carry it, scored by theta_t."""
    run, pool = RunDir(tmp_path), CountingPool()
    plan = exchange.PlayPlan(run, pool, [None] * 3, anchored=True)
    firsts = [[7, 7], [9, 9], [6]]
    pairs = [
        Pair(k, 0, 0, 0, np.array([1], np.int32), np.array([3], np.int32), np.array(first, np.int32), -np.ones(1, np.float32), -np.ones(len(first), np.float32), "stop")
        for k, first in enumerate(firsts)
    ]
    exchange.write_table(run.pairs(0, "block", 0), to_table(pairs, PAIR_SCHEMA))
    assert asyncio.run(exchange.with_anchors(plan, BlockSpec(0, 0, 0, 3, Version(0)), pairs)) == pairs
    assert asyncio.run(exchange.with_anchors(plan, BlockSpec(1, 1, 0, 3, Version(1)), pairs)) == pairs and pool.num_scored == 0
    written = [dataclasses.replace(pair, generated_ids=np.array([9, 9], np.int32), iteration=1, opponent_version=1) for pair in reversed(pairs)]
    for block in (BlockSpec(1, 0, 0, 3, Version(1)), BlockSpec(2, 1, 0, 3, Version(2))):
        pool.num_scored = 0
        found = {pair.prompt_id: pair for pair in asyncio.run(exchange.with_anchors(plan, block, written))}
        assert [found[k].anchor_ids.tolist() for k in range(3)] == [[7, 7], [], [6]] and pool.num_scored == 2
        assert [found[k].opponent_anchor_logps.tolist() for k in range(3)] == [[-7, -7], [], [-6]]
    [unscored] = asyncio.run(exchange.with_anchors(dataclasses.replace(plan, score=False), BlockSpec(1, 0, 0, 3, Version(1)), written[:1]))
    assert unscored.anchor_ids.tolist() == [6] and len(unscored.opponent_anchor_logps) == 0


def test_looking_for_a_replayed_block_leaves_alone_what_is_not_uploaded_yet(tmp_path, make_pairs):
    storage = ObjectStore(f"memory://{tmp_path.name}", tmp_path / "here")
    run = RunDir(tmp_path / "here/run", storage)
    path, spec = run.pairs(1, "replay", 0), BlockSpec(1, 0, 0, 3, Version(1))
    exchange.write_table(path, to_table(make_pairs(3), PAIR_SCHEMA))
    assert exchange._replayed(exchange.PlayPlan(run, None, None), spec) == [] and path.exists()
    storage.publish(path)
    assert len(exchange._replayed(exchange.PlayPlan(run, None, None), spec)) == 3


def test_versions_are_ordered_as_the_main_player_reaches_them():
    assert Version(1, 5).precedes(Version(1, 2)) and Version(1, 2).precedes(Version(1)) and Version(1).precedes(Version(2, 9))
    assert not Version(1).precedes(Version(1)) and not Version(1).precedes(Version(1, 3))


def test_saved_config_is_plain_json(tmp_path):
    run = RunDir.open(config(tmp_path))
    assert json.loads((run.path / "config.json").read_text())["spin"]["beta"] == 0.1


def test_a_damaged_block_is_noticed_and_named(tmp_path, make_pairs):
    path = tmp_path / "block.parquet"
    exchange.write_table(path, to_table(make_pairs(50), PAIR_SCHEMA))
    assert exchange.pairs_on_disk(path) is not None and len(exchange.read_pairs(path)) == 50
    whole = path.read_bytes()
    for place in range(8, len(whole) // 2, 97):  # a flipped bit anywhere in the data
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if exchange.pairs_on_disk(path) is None:
            break
    else:
        pytest.fail("no flipped bit was noticed")
    path.write_bytes(whole[: len(whole) // 2])
    assert exchange.pairs_on_disk(path) is None
    with pytest.raises(BadInput, match=r"block\.parquet: this block of pairs is damaged"):
        exchange.read_pairs(path)


def test_a_damaged_model_is_never_loaded(tmp_path):
    run = RunDir.open(config(tmp_path))
    run.model(0).mkdir(parents=True)
    (run.model(0) / "model.safetensors").write_bytes(b"weights")
    run.check_weights(0, [run.model(0)])  # a run that was cut off before its checksums were known
    assert len(run.marks("checksums")) == 1
    run.check_weights(0, [run.model(0)])
    (run.model(0) / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(BadInput, match=r"iter_000/model/model\.safetensors: missing or damaged"):
        run.check_weights(0, [run.model(0)])


def test_damaged_prompts_are_named(tmp_path):
    path = tmp_path / "block.parquet"
    exchange.write_table(path, to_table([Prompt(0, np.array([1, 2], np.int32), np.array([3], np.int32), "x")], PROMPT_SCHEMA))
    assert len(exchange.read_prompts(path)) == 1
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"block\.parquet: these prompts are damaged .*must be put back"):
        exchange.read_prompts(path)


@pytest.mark.parametrize(("keep", "needed", "pairs", "checkpoints"), [
    (RunConfig(), {2}, [True] * 4, [False, False, True, True]),
    (RunConfig(keep_pairs_iterations=1, keep_checkpoints=2), {2}, [False, False, True, True], [False, True, True, True]),
    (RunConfig(keep_pairs_iterations=1), {0, 2}, [True, False, True, True], [False, False, True, True]),
])
def test_what_finished_iterations_leave_and_a_crash_kept_is_dropped(tmp_path, keep, needed, pairs, checkpoints):
    run = RunDir(tmp_path)
    for t in range(4):
        for path in (run.progress(t), run.checkpoint(t), run.iteration(t) / "pairs"):
            path.mkdir(parents=True)
    for t in range(3):
        run.mark("iteration", iteration=t)
    run.drop_outdated(keep, needed)
    assert [run.progress(t).exists() for t in range(4)] == [False, False, False, True]
    assert [run.checkpoint(t).exists() for t in range(4)] == checkpoints
    assert [(run.iteration(t) / "pairs").exists() for t in range(4)] == pairs  # the newest finished ones are replayed


def test_nothing_to_play_is_no_pipeline_at_all():
    assert list(exchange.play(None, [], 1)) == []


def test_bench_overlap_compares_pairs_one_by_one(tmp_path, make_pairs):
    pairs = make_pairs(4)
    for name, changed in (("a", pairs), ("b", [*pairs[:3], dataclasses.replace(pairs[3], generated_ids=pairs[3].generated_ids + 1)])):
        (tmp_path / name / "iter_000/pairs").mkdir(parents=True)
        exchange.write_table(tmp_path / name / "iter_000/pairs/block_00000.parquet", to_table(changed, PAIR_SCHEMA))
    same, other = bench_overlap.compare(tmp_path / "a", tmp_path / "a"), bench_overlap.compare(tmp_path / "a", tmp_path / "b")
    assert same == {"pairs_identical": True, "num_pairs": 4, "num_pairs_identical": 4, "largest_reference_difference_nats": 0.0}
    assert not other["pairs_identical"] and other["num_pairs_identical"] == 3
