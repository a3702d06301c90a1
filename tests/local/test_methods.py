"""SFT and DPO through the whole job: the same run directory as SPIN's, resume after a kill, and for DPO TRL's losses and weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from test_run import ROOT, manifest, metrics, spin_ray

from spin_ray.demo import resolve
from spin_ray.demo.tasks import careless_answer, draw_task
from spin_ray.exchange.pairs import read_prompts

STEPS, BATCH = 10, 8


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Path:
    """Careful answers against careless ones."""
    rng, path = Random(0), tmp_path_factory.mktemp("preferences") / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(STEPS * BATCH):
            task = draw_task(rng)
            file.write(json.dumps({"prompt": task.instruction, "chosen": task.careful, "rejected": careless_answer(task, rng)}) + "\n")
    return path


def test_dpo_takes_the_steps_of_trl(preferences, tmp_path):
    """On the same rows, in the same order: every loss, and after ten steps the weights, in float32."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    done = spin_ray(
        "run", "conf/demo.yaml", "method=dpo", f"run.dir={tmp_path}", "run.name=dpo", f"data.train={preferences}", "data.eval=", "dpo.lr=1e-4",
        "dpo.beta=0.3", f"learner.batch_pairs={BATCH}", "learner.warmup_fraction=0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "dpo"
    prompts = [prompt for block in sorted((run / "prompts").glob("block_*")) for prompt in read_prompts(block)]
    rows = [{"prompt_ids": p.prompt_ids.tolist(), "chosen_ids": p.real_ids.tolist(), "rejected_ids": p.rejected_ids.tolist()} for p in prompts]
    losses = []

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it already has the token ids

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    folder = resolve("demo:sft")
    trainer = Tokenised(
        model=folder, processing_class=AutoTokenizer.from_pretrained(folder), train_dataset=Dataset.from_list(rows),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, loss_type="sigmoid",
            beta=0.3, learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0, num_train_epochs=1,
            train_sampling_strategy="sequential", per_device_train_batch_size=BATCH, model_init_kwargs={"dtype": "float32"},
        ),
    )
    trainer.train()
    assert metrics(run, "train/pair_loss") == pytest.approx(losses, rel=1e-4) and len(losses) == STEPS
    start, ours, theirs = load_file(Path(folder) / "model.safetensors"), load_file(run / "iter_000/model/model.safetensors"), trainer.model.state_dict()
    moved = sum((theirs[name].float() - weight.float()).abs().sum() for name, weight in start.items())
    apart = sum((theirs[name].float() - weight).abs().sum() for name, weight in ours.items())
    assert apart < 0.01 * moved, (apart, moved)  # Adam makes a step of the rounding noise of gradients near 0


@pytest.mark.parametrize("method", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_a_killed_run_goes_on_from_its_last_saved_step_to_the_same_weights(method, preferences, tmp_path):
    options = [
        f"method={method}", f"run.dir={tmp_path}", f"data.train={preferences}", "data.max_eval_prompts=8", "sft.lr=1e-4", "dpo.lr=1e-4",
        "sft.num_epochs=4", "dpo.num_epochs=4", f"learner.batch_pairs={BATCH}", "learner.checkpoint_every_steps=4",
    ]
    assert spin_ray("run", "conf/demo.yaml", *options, "run.name=whole").returncode == 0
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "spin_ray", "run", "conf/demo.yaml", *options, "run.name=killed"]
    killed = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    count, until = tmp_path / "killed/iter_000/progress/count.json", time.monotonic() + 400
    while not count.exists() and killed.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = spin_ray("run", "conf/demo.yaml", *options, "run.name=killed")
    assert again.returncode == 0, again.stderr[-3000:]
    whole, resumed = ({mark["stage"]: mark for mark in manifest(tmp_path / name)} for name in ("whole", "killed"))
    assert resumed["iteration"]["report"]["num_steps"] == whole["iteration"]["report"]["num_steps"] == 4 * STEPS
    assert resumed["evaluation"]["version"] == 1 and set(resumed["evaluation"]["metrics"]) == set(whole["evaluation"]["metrics"])
    left, right = (load_file(tmp_path / name / "iter_000/model/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(weight, right[name]) for name, weight in left.items())
    same = spin_ray("run", "conf/demo.yaml", *options, "run.name=killed")
    assert same.returncode == 0 and "is finished" in same.stdout
