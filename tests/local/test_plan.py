"""`spin-ray plan`: what it predicts is what a run takes, within 20 %, and it says so in words for machines that are not here."""

import json
import sys
from pathlib import Path

import pytest

from spin_ray.__main__ import main
from spin_ray.bench import plan as bench
from spin_ray.bench.common import run_command
from spin_ray.bench.plan import Case
from spin_ray.bench.workload import save_model
from spin_ray.config import load_config
from spin_ray.look.plan.inputs import Asked
from spin_ray.look.plan.plan import make_plan

CONF = Path(__file__).parents[2] / "conf"
WITHIN = 0.2


def off(predicted, measured):
    return predicted / measured - 1


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(settings, metrics) of a short run of the demo."""
    folder = tmp_path_factory.mktemp("runs")
    words = [f"run.dir={folder}", "run.max_steps=3", "spin.num_iterations=1", "data.max_prompts=96", "data.eval=", "tracking.wandb.mode=disabled"]
    run_command("-m", "spin_ray", "run", CONF / "demo.yaml", *words)
    return words, [json.loads(line) for line in (folder / "demo" / "metrics.jsonl").read_text().splitlines()]


def test_the_demos_learner_takes_what_was_predicted(demo):
    words, metrics = demo
    measured = max(line.get("train/peak_memory_gib", 0) for line in metrics)
    predicted = make_plan(load_config(CONF / "demo.yaml", words)[0], Asked()).learner.peak / 2**30
    assert abs(off(predicted, measured)) < WITHIN, (predicted, measured)


def test_rates_of_an_earlier_run_are_used_and_said_to_be_measured(demo, capsys):
    words, _ = demo
    assert main(["plan", str(CONF / "demo.yaml"), *words]) == 0
    out = capsys.readouterr().out
    assert "measured: all rows of demo:train tokenised; 96 prompts" in out and "metrics.jsonl" in out
    assert "1 learner, each 0.5 CPU" in out and "if all of it is on this machine: yes" in out
    assert not any(module in sys.modules and getattr(sys.modules[module], "is_initialized", bool)() for module in ("ray",))


@pytest.fixture(scope="module")
def base():
    """GiB of a process without a model."""
    return bench.measured(bench.BARE)


SMALL = [
    Case("all weights", ("learner.pack_tokens=448",), model="small"),
    Case("an adapter", ("learner.pack_tokens=448", "lora.rank=16"), model="small"),
    Case("recomputed, RMSprop, ZeRO-2, frozen scorer", (
        "learner.activation_checkpointing=true", "learner.optimizer=rmsprop", "learner.zero_stage=2", "reference.scorer=frozen"), model="small"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_benchs_small_model_takes_what_was_predicted(case, base):
    predicted, measured = bench.predicted(case, base), bench.measured(case)
    assert abs(off(predicted, measured)) < WITHIN, (predicted, measured)


@pytest.mark.slow
def test_a_model_of_smollm2s_size_takes_what_was_predicted(base):
    [case] = [case for case in bench.CASES if case.model == "smollm2"]
    predicted, measured = bench.predicted(case, base), bench.measured(case)
    assert abs(off(predicted, measured)) < WITHIN, (predicted, measured)


@pytest.fixture(scope="module")
def zephyr(tmp_path_factory):
    """A folder with nothing but the config of a model of 7B weights."""
    folder = tmp_path_factory.mktemp("zephyr")
    save_model(folder, "zephyr-7b", weights=False)
    return folder


GIVEN = ("--prompt-tokens", "256", "--answer-tokens", "256", "--num-prompts", "50000")


def test_a_cluster_that_is_not_here(zephyr, capsys):
    assert main(["plan", str(CONF / "zephyr7b_8gpu.yaml"), f"model.path={zephyr}", *GIVEN, "--price-per-gpu-hour", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 samplers, each 1 GPU" in out and "4 learners, each 1 GPU" in out and "separate: 8 GPUs" in out
    assert "given: 50,000 prompts of 256 tokens" in out and "7.242B × 2 B / 4" in out
    assert "not measured on a GPU" in out and "assumed: 8 FLOPs a weight" in out
    assert "80 GiB  fits" in out and "24 GiB  does not fit" in out and "What to change for 24 GiB" in out and "GPU hours" in out


def test_as_json_with_given_rates(zephyr, capsys):
    rates = ("--learner-tokens-per-s", "8000", "--sampler-tokens-per-s", "4000", "--gpu-memory-gib", "80", "--json")
    assert main(["plan", str(CONF / "zephyr7b_8gpu.yaml"), f"model.path={zephyr}", *GIVEN, *rates]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["learner"]["peak_gib"] == pytest.approx(sum(told["learner"]["parts_gib"].values()))
    assert told["speeds"]["learner"] == {"value": 8000.0, "source": "given"} and not told["measured_on_a_gpu"]
    assert told["num_gpus"] == 8 and [fit["fits"] for fit in told["fits"]] == [True] and len(told["iterations"]) == 4


def test_what_to_change_is_cumulative_and_ends_where_it_fits(zephyr, capsys):
    words = [f"model.path={zephyr}", "learner.activation_checkpointing=false", *GIVEN, "--gpu-memory-gib", "40", "--json"]
    assert main(["plan", str(CONF / "zephyr7b_8gpu.yaml"), *words]) == 0
    [changes] = json.loads(capsys.readouterr().out)["changes"].values()
    peaks = [change["peak"] for change in changes]
    assert changes[0]["setting"] == "learner.activation_checkpointing=true" and peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 38.5 * 2**30 and all(peak > 38.5 * 2**30 for peak in peaks[:-1])


@pytest.mark.parametrize(("words", "told"), [
    (["--prompt-tokens", "5"], "go together: give all three, or none"),
    ([*GIVEN, "--gpu-memory-gib", "-1"], "--gpu-memory-gib -1: must be above 0"),
    ([], "only a config there, no weights; give how long the rows are"),
    ([*GIVEN, "model.path=no/such-model"], "no config can be read there"),
])
def test_what_is_not_there_is_said_in_one_line(words, told, zephyr, capsys):
    assert main(["plan", str(CONF / "zephyr7b_8gpu.yaml"), f"model.path={zephyr}", *words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spin-ray:")]
    assert told in line
