"""W&B's own process may die, as `ray job stop` has it do: the run goes on, and metrics.jsonl has every metric."""

import json
import subprocess
import sys
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.config import Config, RunConfig
from spin_ray.tracking import Tracker, _as_json

CODE = """
import signal, sys
from pathlib import Path
import psutil
from spin_ray.config import load_config
from spin_ray.tracking import Tracker

config, _ = load_config("conf/demo.yaml", ["tracking.wandb.mode=offline"])
with Tracker(config, Path(sys.argv[1]), print) as tracker:
    tracker.log("train", {"loss": 1.0}, step=0)
    for process in psutil.Process().children(recursive=True):
        process.send_signal(signal.SIGTERM)
        process.wait()
    for step in range(1, 4):
        tracker.log("train", {"loss": 1.0}, step=step)
    tracker.table("samples", ["prompt"], [["x"]])
"""


def test_a_run_outlives_the_process_of_weights_and_biases(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("Weights & Biases' own process has ended") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


READ_BACK = """
import sys
from pathlib import Path
from spin_ray.config import load_config
from spin_ray.tracking import Tracker

root = Path(sys.argv[1])
config, _ = load_config("conf/demo.yaml", ["tracking.wandb.mode=offline", "tracking.wandb.log_models=true", "tracking.wandb.tags=[search]", "tracking.wandb.group=lr"])
model = root / "iter_000" / "model"
model.mkdir(parents=True)
(model / "config.json").write_text("{}")
(root / "report.html").write_text("<p>one</p>")
with Tracker(config, root, print) as tracker:
    tracker.model(0, "HuggingFaceTB/SmolLM2-135M", None, {})
    tracker.model(1, str(model), model, {"exact_match_t1_share": 0.4})
    tracker.table("answers", ["prompt", "theta_0", "theta_1"], [["x", "a", "b"]])
    tracker.file(root / "report.html")
"""


BLOCK, HEADER = 32768, 7
"""Of W&B's file, which is a log as LevelDB writes it: blocks of records, each with checksum (4 bytes), length (2) and kind (1)."""


def records(folder):
    """All records of an offline run."""
    from wandb.proto import wandb_internal_pb2 as pb

    data = next(folder.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    at, parts, found = HEADER, b"", []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            found.append(pb.Record.FromString(parts))
            parts = b""
    return found


def test_tags_models_tables_and_the_report_are_in_the_offline_run(tmp_path):
    done = subprocess.run([sys.executable, "-c", READ_BACK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = records(tmp_path)
    [run] = [record.run for record in found if record.WhichOneof("record_type") == "run"][:1]
    assert set(run.tags) == {"spin", "search"} and run.run_group == "lr"
    requests = str([record for record in found if record.WhichOneof("record_type") in ("artifact", "use_artifact", "request")])
    for said in ("demo-model", "demo-theta_0", "theta_1", "SmolLM2-135M", "exact_match_t1_share"):
        assert said in requests, said
    assert any("answers" in str(record.history) for record in found if record.WhichOneof("record_type") == "history")
    assert any(file.path == "report.html" for record in found if record.WhichOneof("record_type") == "files" for file in record.files.files)
    assert list(tmp_path.glob("wandb/offline-run-*/files/report.html"))


@given(st.text(min_size=1, max_size=300))
@settings(deadline=None, max_examples=50)
def test_any_name_of_a_run_makes_a_name_that_artifacts_take(name):
    import wandb

    tracker = object.__new__(Tracker)
    tracker._config = replace(Config(), run=RunConfig(name=name))
    for version in (0, 1):
        wandb.Artifact(tracker._artifact_name(version), type="model")


@given(st.dictionaries(st.text(max_size=5), st.floats() | st.integers(-9, 9), max_size=5))
def test_any_metrics_are_facts_that_artifacts_take(metrics):
    import wandb

    wandb.Artifact("model", type="model", metadata=_as_json(metrics))
