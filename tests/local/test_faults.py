"""Processes that are really killed while a run goes on: it ends as if nothing had happened, and leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from watching import records, steps, wait_for

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 320
SECRETS = {
    "WANDB_API_KEY": "5ec2e7" + 34 * "a", "HF_TOKEN": "hf_5ec2e7Hub", "AWS_SECRET_ACCESS_KEY": "5ec2e7/Aws+Key", "OPENAI_API_KEY": "sk-5ec2e7",
}


def start(runs: Path, name: str, *program: str) -> subprocess.Popen:
    """The command line, or another program with the same arguments, in a new run or where an earlier one stopped."""
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "spin_ray")), "run", "conf/demo.yaml", f"run.dir={runs}", f"run.name={name}",
         "spin.num_iterations=2", f"data.max_prompts={NUM_PROMPTS}", "data.eval=''", "sampler.block_prompts=16", "learner.batch_pairs=8",
         "sampler.temperature=0", "learner.checkpoint_every_steps=5",
         f"learner.cpus_per_worker={max(os.cpu_count(), 2) - 1}"],  # no room for a second group beside what a dead controller left
        cwd=ROOT, env={**env, **SECRETS}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


def kill(run: subprocess.Popen, title: str) -> None:
    """SIGKILL the process of the run that shows this title, or a call of that actor."""
    found = []
    for process in family(run):
        with suppress(psutil.NoSuchProcess):
            if process.name().split(".")[0] == title and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    assert len(found) == 1, found
    found[0].kill()


def catches(run: subprocess.Popen, number: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    status = Path(f"/proc/{run.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def family(run: subprocess.Popen) -> list[psutil.Process]:
    driver = psutil.Process(run.pid)
    return [driver, *driver.children(recursive=True)]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=120)
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


@dataclass(frozen=True)
class Watched:
    """What could be seen from outside while a run went on."""

    processes: list[psutil.Process]
    command_lines: str
    listening: set[tuple[str, str]]
    """(name of a process, address that it listens on)."""
    leaks: list[str]
    """Files of Ray's session that hold a secret; the folder is removed when a run ends well."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> tuple[Path, Watched]:
    """An undisturbed run, looked at while both players were at work."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = start(run.parent, run.name)
    wait_for(lambda: len(steps(run, 0)) > 3, "some steps of iteration 0")
    processes = family(process)
    seen = Watched(
        processes, "\n".join(" ".join(p.cmdline()) for p in processes),
        {(p.name(), c.laddr.ip) for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}, [],
    )
    wait_for(lambda: len(steps(run, 1)) > 20, "half of iteration 1")
    session = Path(re.search(r"--session-dir=(\S+)", seen.command_lines)[1])
    assert len(list(session.rglob("*.out"))) > 3  # it is the folder in which Ray's processes write
    seen.leaks.extend(holding_secrets(session))
    assert process.wait(timeout=1800) == 0 and not session.exists()
    return run, seen


def holding_secrets(folder: Path) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # a socket, or gone meanwhile
            content = path.read_bytes()
            found += [f"{name} in {path}" for name, secret in SECRETS.items() if secret.encode() in content]
    return found


@pytest.fixture(scope="module")
def undisturbed(watched) -> Path:
    return watched[0]


def test_a_finished_run_leaves_no_process(watched):
    assert_gone(watched[1].processes)


def test_secrets_of_the_environment_reach_no_file_and_no_command_line(watched):
    run, seen = watched
    assert list(run.rglob("*.wandb")) and [*seen.leaks, *holding_secrets(run)] == []
    assert [name for name, secret in SECRETS.items() if secret in seen.command_lines] == []


def test_ray_listens_on_this_machine_only(watched):
    _, seen = watched
    assert {"raylet", "gcs_server"} <= {name for name, _ in seen.listening}
    open_to_others = {name for name, address in seen.listening if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    assert open_to_others <= {"ray::RayTrainWorker"}  # the store of torch.distributed, which cannot be told an address


WORKER_DIES_AT_THE_FIRST_SYNC = """
import sys, time, psutil
from spin_ray.__main__ import main
from spin_ray.opponent import Opponent

def load_without_worker(opponent, weights):
    Opponent.load = load
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::RayTrainWorker"):
            process.kill()
            process.wait()
    time.sleep(2)  # until the object store has let go of what the worker had put there
    load(opponent, weights)

load, Opponent.load = Opponent.load, load_without_worker
sys.exit(main())
"""


@pytest.mark.slow
def test_all_that_is_replaced_dies_and_the_run_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    run = undisturbed.parent / "disturbed"
    (tmp_path / "dies.py").write_text(WORKER_DIES_AT_THE_FIRST_SYNC)
    process = start(run.parent, run.name, str(tmp_path / "dies.py"))
    wait_for(lambda: list(run.glob("iter_000/pairs/*.parquet")), "the first block")
    kill(process, "ray::Sampler")
    kill(process, "ray::MapWorker(MapBatches(PlayBlock))")
    wait_for(lambda: len(steps(run, 0)) > 12, "some steps of iteration 0")
    kill(process, "ray::RayTrainWorker")
    wait_for(lambda: len(steps(run, 1)) > 7, "some steps of iteration 1")
    kill(process, "ray::TrainController")
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output[-3000:]
    assert max(r.get("sampler/num_restarts", 0) for r in records(run, "metrics.jsonl")) == 1
    for t, total in ((0, 40), (1, 80)):
        done = steps(run, t)
        assert set(done) == set(range(total)) and len(done) < 2 * total  # gone on from the last progress, not from the start
        ids = [i for path in run.glob(f"iter_00{t}/pairs/block_*.parquet") for i in pq.read_table(path).column("prompt_id").to_pylist()]
        assert sorted(ids) == list(range(NUM_PROMPTS))
    reports = [mark["report"] for mark in records(run, "manifest.jsonl") if mark["stage"] == "iteration"]
    assert [report["num_pairs"] for report in reports] == [NUM_PROMPTS, 2 * NUM_PROMPTS]
    for path in undisturbed.glob("iter_*/pairs/*.parquet"):
        expected, found = pq.read_table(path), pq.read_table(run / path.relative_to(undisturbed))
        assert expected.column("generated_ids") == found.column("generated_ids"), path
    assert_same_models(undisturbed, run)
    assert not list(run.rglob("progress")) and not list(run.rglob(".*.tmp"))


@pytest.mark.slow
def test_interrupted_run_saves_its_progress_leaves_nothing_behind_and_goes_on(undisturbed):
    run, shared_memory = undisturbed.parent / "interrupted", set(os.listdir("/dev/shm"))
    process = start(run.parent, run.name)
    wait_for(lambda: catches(process, signal.SIGTERM), "the command to listen")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and output == "spin-ray: interrupted; the same command goes on\n"

    process = start(run.parent, run.name)
    wait_for(lambda: len(steps(run, 0)) > 6, "some steps of iteration 0")
    processes = family(process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "of iteration 0; the same command goes on" in output
    assert_gone(processes)
    assert (run / "iter_000/progress/count.json").is_file()
    done, interrupted_at = steps(run, 0), json.loads((run / "iter_000/progress/count.json").read_text())["steps"]
    assert done == list(range(interrupted_at))

    process = start(run.parent, run.name)
    wait_for(lambda: len(steps(run, 0)) > interrupted_at, "one more step of iteration 0")
    processes = family(process)
    ports = {c.laddr.port for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # another one: two of the same kind may arrive as one
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "after step" not in output, output[-2000:]  # not when the step is done: at once
    assert_gone(processes)
    assert not ports & {c.laddr.port for c in psutil.net_connections() if c.status == psutil.CONN_LISTEN}
    assert set(os.listdir("/dev/shm")) <= shared_memory

    assert start(run.parent, run.name).wait(timeout=1800) == 0
    assert steps(run, 1) == list(range(80))  # of iteration 0 the log of steps that were under way at the second Ctrl-C is missing
    assert_same_models(undisturbed, run)


def assert_same_models(left: Path, right: Path) -> None:
    """Bit by bit."""
    models = list(left.glob("iter_*/model/model.safetensors"))
    assert len(models) == 2
    for path in models:
        theirs = load_file(right / path.relative_to(left))
        for name, weight in load_file(path).items():
            assert torch.equal(weight, theirs[name]), f"{path}: {name} differs by {(weight - theirs[name]).abs().max()}"


DIES_AFTER_A_MARK = """
import os, sys, psutil
from spin_ray.__main__ import main
from spin_ray.manifest import RunDir

def mark_and_die(run, stage, **facts):
    mark(run, stage, **facts)
    if stage != "finished":
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os._exit(9)

mark, RunDir.mark = RunDir.mark, mark_and_die
sys.exit(main())
"""


@pytest.mark.slow
def test_interrupted_after_every_stage_a_run_ends_with_the_same_bits(undisturbed, tmp_path):
    """One replica, one worker, greedy, float32: nothing that an interruption changes may change a result."""
    run = undisturbed.parent / "often"
    (tmp_path / "dies.py").write_text(DIES_AFTER_A_MARK)
    codes = []
    while not codes or codes[-1] == 9:
        process = start(run.parent, run.name, str(tmp_path / "dies.py"))
        output, _ = process.communicate(timeout=1800)
        codes.append(process.returncode)
    stages = [(mark["stage"], mark.get("iteration")) for mark in records(run, "manifest.jsonl")]
    assert codes == [9] * (len(stages) - 1) + [0], output[-3000:]
    assert stages == [("prepared", None), ("iteration", 0), ("checksums", 0), ("iteration", 1), ("checksums", 1), ("finished", None)]
    for path in undisturbed.glob("iter_*/pairs/*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(run / path.relative_to(undisturbed))), path
    assert_same_models(undisturbed, run)
