"""Every setting of a run: names, types, defaults and what they mean. YAML files hold only what differs.

The only file that touches OmegaConf. A config is read once, checked, saved with the run and never written again.
Importing this module imports neither torch nor ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from spin_ray.errors import BadInput


@dataclass
class RunConfig:
    name: str = "spin"
    """Name of the run: its folder and its W&B run."""
    dir: str = "runs"
    """Folder that holds the run's folder; on several nodes a path they all see, or a URL: s3://bucket/runs, gs://, whatever
    pyarrow or fsspec knows. Credentials are the environment's, never part of it."""
    scratch: str = "~/.cache/spin_ray"
    """If run.dir is a URL: a folder on every node for what is on its way to or from there. May be deleted between runs."""
    seed: int = 0
    """Seed of the order of the data and of the sampler."""
    max_steps: int = 0
    """Stop every iteration after this many optimizer steps, to try a config out; 0: no limit."""
    keep_pairs_iterations: int = 0
    """Keep the pairs of this many newest iterations; 0: of all. The newest one's are always needed: the next one replays them."""
    keep_checkpoints: int = 1
    """Keep the DeepSpeed checkpoints of this many newest iterations; only the newest is ever used. Models are all kept."""


@dataclass
class ModelConfig:
    path: str = MISSING
    """Folder of a Hugging Face model with its tokenizer, a hub name, or demo:sft / demo:base."""
    dtype: str = "auto"
    """Weights in sampler and learner's forward: float32, bfloat16, or auto (bfloat16 on GPUs, else float32)."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""
    chat_template: str = ""
    """Chat template in place of the tokenizer's: a Jinja file, or the name of a shipped one; empty: the tokenizer's own."""


@dataclass
class DataConfig:
    train: str = MISSING
    """SFT data: .jsonl, .json, .parquet, a folder saved by `datasets`, a hub data set name, or demo:train."""
    eval: str = ""
    """Held-out data in any of these forms, or demo:heldout; empty: no evaluation."""
    split: str = "train"
    """Split of data.train, where that has several: a hub data set, or a folder of one."""
    eval_split: str = ""
    """The same for data.eval; empty: as data.split."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns of a row, and keys of a message, that do not belong to the dialogue. Any that is neither known nor named here is refused."""
    turns: str = "last"
    """Which assistant turns of a dialogue become y: last, first or all. The prompt is everything before that turn."""
    max_prompts: int = 0
    """Train on this many prompts, drawn with the run's seed; 0: all."""
    max_eval_prompts: int = 500
    """Evaluate on this many prompts; 0: all."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    max_answer_tokens: int = 1024
    """Longest real answer, in tokens with its end-of-turn token."""
    long_rows: str = "drop"
    """Rows past these lengths: drop (and count) or refuse. A row is never cut."""
    bad_rows: str = "refuse"
    """Rows without a usable answer: refuse, or drop (and count)."""
    duplicate_rows: str = "drop"
    """Rows with the prompt and the answer of an earlier row: drop (and count) or keep (and count)."""


@dataclass
class SpinConfig:
    num_iterations: int = 4
    """T of Algorithm 1."""
    num_epochs: int = 2
    """Passes over the pairs of an iteration."""
    beta: Any = 0.1
    """The paper's lambda: scale of the log-ratio margin; one value, or one per iteration."""
    lr: Any = 5e-7
    """Peak learning rate; one value, or one per iteration."""
    replay: bool = True
    """From iteration 1 on also train on the pairs of the iteration before, re-scored by the present opponent (paper, section 6.1)."""
    loss: str = "logistic"
    """The paper's l: logistic, hinge, exponential or correlation."""
    nll_weight: float = 0.0
    """Weight of an added negative log-likelihood of y, per token (Iterative RPO, arXiv 2404.19733); 0 is the paper."""


@dataclass
class SftConfig:
    """Only for the command `sft`."""

    num_epochs: int = 1
    lr: float = 2e-5


@dataclass
class SamplerConfig:
    num_replicas: int = 1
    """Opponent sampler actors, each with an engine of its own."""
    tensor_parallel_size: int = 1
    """GPUs that share one replica's model."""
    gpus_per_replica: int | None = None
    """None: tensor_parallel_size when the cluster has GPUs, else 0."""
    cpus_per_replica: float = 0.5
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    """Longest generated answer, in tokens."""
    block_prompts: int = 64
    """Prompts in one block: the unit of work, of durability and of streaming."""
    max_num_seqs: int = 256
    """Answers that one engine writes at the same time."""
    request_timeout_s: float = 1800.0
    """Seconds after which a replica that still owes an answer counts as hanging, and is started anew."""
    heartbeat_timeout_s: float = 300.0
    """Seconds without a sign of life of a replica that owes answers, or that its engine is at one step, after which it counts as
    hanging; 0: only `request_timeout_s` tells."""
    max_restarts: int = 5
    """Restarts of replicas that are put up with within `restart_window_s`; one more stops the run with the first error."""
    restart_window_s: float = 600.0
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for the engine."""


@dataclass
class LearnerConfig:
    num_workers: int = 1
    """Ray Train workers of the main player."""
    gpus_per_worker: int | None = None
    """None: 1 when the cluster has GPUs, else 0."""
    cpus_per_worker: float = 0.5
    batch_pairs: int = 64
    """Pairs in one optimizer step, over all workers."""
    pack_tokens: int = 8192
    """Token budget of one micro-batch; a longer single pair still gets a micro-batch of its own."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage, 0 to 3."""
    optimizer: str = "rmsprop"
    """rmsprop (the paper's) or adamw."""
    weight_decay: float = 0.0
    warmup_fraction: float = 0.1
    """Share of an iteration's steps in which the learning rate rises; it then falls linearly to 0."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    checkpoint_every_steps: int = 0
    """Save the main player's progress every so many optimizer steps of an iteration; 0: only at its end."""
    max_restarts: int = 3
    """Restarts of the group of workers, after one of them died, that are put up with; one more stops the run."""
    activation_checkpointing: bool = False
    """Recompute the layers' activations in the backward pass."""
    share_prompt: bool = True
    """Compute the prompt of y and y', and what both begin with, once, where the attention backend can."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer states in the CPU's memory and step there; needs zero_stage 1, 2 or 3."""
    compile: bool = False
    """torch.compile the layers' norms and feed-forward blocks; the first steps take a minute longer."""


@dataclass
class ReferenceConfig:
    scorer: str = "opponent"
    """Who computes the reference log-probs: opponent (the sampler, while it samples; no memory in the learner), frozen (the
    learner, block by block, with a copy of theta_t: exact, one copy of the weights), or learner (the learner, before the
    iteration's first step: exact, no memory, but training starts when all is sampled)."""


@dataclass
class OverlapConfig:
    mode: str = "stream"
    """stream: train on the first finished block while later ones are sampled; sequential: sample all, then train; lookahead:
    a snapshot of the main player, taken before the end of an iteration, plays the next one's first blocks (not exact)."""
    lookahead_fraction: float = 0.1
    """lookahead: how long before an iteration's end the snapshot is taken, as a share of its optimizer steps, and the share of
    the next iteration's blocks that it plays."""


@dataclass
class AuditConfig:
    num_prompts: int = 16
    """Prompts on which sampler and learner are compared after every weight sync."""
    tolerance: float = 0.0
    """Largest mean |difference| of log-probs per token, in nats, before the run stops; 0: by dtype."""


@dataclass
class GuardConfig:
    """What is done about bad numbers."""

    on_divergence: str = "stop"
    """At a loss or gradient that is not a number: stop the run, or rollback: the iteration's training starts over from theta_t."""
    max_rollbacks: int = 2
    """Rollbacks in a run that are put up with; one more stops it."""
    rollback_lr_factor: float = 0.5
    """What each rollback multiplies the learning rate by, from there to the end of the run."""
    num_answers: int = 256
    """Answers of an iteration after which the opponent is judged by them; an iteration with fewer is not judged."""
    max_empty_share: float = 0.99
    """Share of empty ones among them past which the run stops; 1: never."""
    max_truncated_share: float = 0.99
    """Share of truncated ones, among as many whose real answer fits into `sampler.max_new_tokens`, past which it stops; 1: never."""
    max_nll_rise_nats: float = 3.0
    """How far the held-out negative log-likelihood may rise above the SFT model's, in nats per token, before it stops; 0: any."""


@dataclass
class WandbConfig:
    mode: str = "offline"
    """online, offline or disabled; the environment's WANDB_MODE wins."""
    project: str = "spin_ray"
    entity: str = ""


@dataclass
class TrackingConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    log_every_steps: int = 1


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    spin: SpinConfig = field(default_factory=SpinConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def on_object_store(self) -> bool:
        return "://" in self.run.dir

    @property
    def run_path(self) -> Path:
        """The run's folder; on an object store the one that stands for it on every node."""
        if self.on_object_store:
            place = Path(self.run.scratch).expanduser().absolute() / hashlib.sha256(self.run.dir.encode()).hexdigest()[:16]
        else:
            place = Path(self.run.dir).expanduser().absolute()
        return place / self.run.name

    def beta(self, iteration: int) -> float:
        return _one_of(self.spin.beta, iteration)

    def lr(self, iteration: int) -> float:
        return _one_of(self.spin.lr, iteration)

    def num_steps(self, num_pairs: int, num_epochs: int) -> int:
        """Optimizer steps on so many pairs: every epoch ends with a batch of its own, however small."""
        steps = num_epochs * -(-num_pairs // self.learner.batch_pairs)
        return min(steps, self.run.max_steps or steps)


CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "data.turns": ("last", "first", "all"),
    "data.long_rows": ("drop", "refuse"),
    "data.bad_rows": ("refuse", "drop"),
    "data.duplicate_rows": ("drop", "keep"),
    "spin.loss": ("logistic", "hinge", "exponential", "correlation"),
    "learner.zero_stage": (0, 1, 2, 3),
    "learner.optimizer": ("rmsprop", "adamw"),
    "reference.scorer": ("opponent", "frozen", "learner"),
    "overlap.mode": ("stream", "sequential", "lookahead"),
    "guard.on_divergence": ("stop", "rollback"),
    "tracking.wandb.mode": ("online", "offline", "disabled"),
}
AT_LEAST_ONE = (
    "data.max_prompt_tokens", "data.max_answer_tokens", "spin.num_iterations", "spin.num_epochs", "sft.num_epochs",
    "sampler.num_replicas", "sampler.tensor_parallel_size", "sampler.max_new_tokens", "sampler.block_prompts",
    "sampler.max_num_seqs", "sampler.request_timeout_s",
    "learner.num_workers", "learner.batch_pairs", "learner.pack_tokens", "audit.num_prompts", "run.keep_checkpoints", "guard.num_answers",
    "tracking.log_every_steps",
)
NOT_NEGATIVE = (
    "run.max_steps", "run.keep_pairs_iterations", "data.max_prompts", "data.max_eval_prompts", "spin.nll_weight", "sampler.temperature",
    "sampler.gpus_per_replica", "sampler.cpus_per_replica",
    "sampler.max_restarts", "sampler.restart_window_s", "sampler.heartbeat_timeout_s", "learner.gpus_per_worker", "learner.cpus_per_worker",
    "learner.weight_decay", "learner.grad_clip", "learner.checkpoint_every_steps", "learner.max_restarts", "audit.tolerance",
    "guard.max_rollbacks", "guard.max_empty_share", "guard.max_truncated_share", "guard.max_nll_rise_nats",
)
RESUME_MAY_CHANGE = (
    "tracking.", "run.dir", "run.scratch", "run.keep_", "guard.on_divergence", "guard.max_", "guard.num_answers",
    "sampler.num_replicas", "sampler.tensor_parallel_size", "sampler.gpu", "sampler.cpus_per_replica", "sampler.max_num_seqs",
    "sampler.request_timeout_s", "sampler.heartbeat_timeout_s", "sampler.max_restarts", "sampler.restart_window_s",
    "learner.gpus_per_worker", "learner.cpus_per_worker", "learner.pack_tokens", "learner.activation_checkpointing",
    "learner.checkpoint_every_steps", "learner.max_restarts", "learner.compile",
)
"""Keys that say where and on what a run is computed, how it is followed, kept and given up: not what it computes, but for float noise.
Not among them: what DeepSpeed's checkpoints are cut by (learner.num_workers, zero_stage, offload_optimizer)."""
SECRET_WORDS = ("key", "secret", "token", "password", "sig", "credential")
"""A URL's query must have none of them in its names."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """Read a YAML file and `key=value` overrides onto the defaults.

    Returns the config and, for every dotted key, where its value came from: "default", the file, or "command line".
    Raises BadInput for an unreadable file, an unknown key (naming the nearest known one), or a value that makes no sense.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such config file; the shipped ones are in conf/")
    try:
        in_file = OmegaConf.load(path)
    except Exception as error:  # the YAML reader's errors have no common base
        raise BadInput(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if not OmegaConf.is_dict(in_file):
        raise BadInput(f"{path}: a config file holds keys and values, such as run: and model:; this one holds a list")
    for override in overrides:
        if "=" not in override:
            raise BadInput(f"{override}: an override has the form key=value, for example spin.beta=0.1")
    given = [f"{override}''" if override.endswith("=") else override for override in overrides]  # key= is the empty text
    return _merge([(str(path), in_file), ("command line", OmegaConf.from_dotlist(given))])


def _merge(layers: list[tuple[str, Any]]) -> tuple[Config, dict[str, str]]:
    known, origin = flatten(Config()), {}
    for source, layer in layers:
        for key in _leaves(layer):
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise BadInput(f"{source}: unknown key {key}; the nearest known key is {near}")
            origin[key] = source
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *[layer for _, layer in layers])
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise BadInput(f"{error.full_key} is not set; give it in the file or as {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise BadInput(f"{_one_line(error)}{_where(error, origin)}") from error
    check(config)
    return config, {key: origin.get(key, "default") for key in known}


def _leaves(layer: Any, prefix: str = "") -> list[str]:
    """Dotted keys of an OmegaConf node, down to what is a value of the schema (a list is a value)."""
    if not OmegaConf.is_dict(layer):
        return [prefix.rstrip(".")] if prefix else []
    return [leaf for key in layer for leaf in (_leaves(layer._get_node(key), f"{prefix}{key}.") or [f"{prefix}{key}"])]


def _where(error: OmegaConfBaseException, origin: dict[str, str]) -> str:
    key = getattr(error, "full_key", None)
    return f" (key {key}, from {origin.get(key, 'default')})" if key else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("full_key")[0].split())


def check(config: Config) -> None:
    """Raise BadInput for the first value that makes no sense, with the arithmetic in the message."""
    values = flatten(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise BadInput(f"{key}={values[key]}: choose one of {', '.join(map(str, choices))}")
    for key in AT_LEAST_ONE:
        if values[key] < 1:
            raise BadInput(f"{key}={values[key]}: must be at least 1")
    for key in NOT_NEGATIVE:
        if values[key] is not None and values[key] < 0:
            raise BadInput(f"{key}={values[key]}: must not be negative")
    for key in ("model.path", "data.train"):
        if values[key] in ("", MISSING):
            raise BadInput(f"{key} is not set; give it in the file or as {key}=...")
    _check_schedule("spin.beta", config.spin.beta, config.spin.num_iterations)
    _check_schedule("spin.lr", config.spin.lr, config.spin.num_iterations)
    if not 0 <= config.learner.warmup_fraction < 1:
        raise BadInput(f"learner.warmup_fraction={config.learner.warmup_fraction}: must be in [0, 1)")
    if not 0 < config.sampler.top_p <= 1:
        raise BadInput(f"sampler.top_p={config.sampler.top_p}: must be in (0, 1]")
    if not 0 < config.guard.rollback_lr_factor < 1:
        raise BadInput(f"guard.rollback_lr_factor={config.guard.rollback_lr_factor}: must be in (0, 1)")
    if not 0 < config.overlap.lookahead_fraction < 1:
        raise BadInput(f"overlap.lookahead_fraction={config.overlap.lookahead_fraction}: must be in (0, 1)")
    if config.overlap.mode == "lookahead" and config.reference.scorer == "learner":
        raise BadInput(
            "overlap.mode=lookahead does not go with reference.scorer=learner: blocks are played ahead so that training can start "
            "at once, but that scorer starts only when all blocks are there; choose opponent or frozen"
        )
    if config.learner.offload_optimizer and config.learner.zero_stage == 0:
        raise BadInput("learner.offload_optimizer=True needs learner.zero_stage 1, 2 or 3 (here 0): only ZeRO moves states to the CPU")
    batch, workers = config.learner.batch_pairs, config.learner.num_workers
    if batch % workers:
        raise BadInput(
            f"learner.batch_pairs={batch} does not divide by learner.num_workers={workers} "
            f"({batch} = {batch // workers} × {workers} + {batch % workers})"
        )
    if not 0 < config.sampler.gpu_memory_utilization <= 1:
        raise BadInput(f"sampler.gpu_memory_utilization={config.sampler.gpu_memory_utilization}: must be in (0, 1]")
    if config.sft.lr <= 0:
        raise BadInput(f"sft.lr={config.sft.lr}: must be a positive number")
    if not config.run.name or "/" in config.run.name or config.run.name in (".", ".."):
        raise BadInput(f"run.name={config.run.name!r}: must be a plain folder name")
    if config.on_object_store:
        _check_url(config.run.dir)
    elif (scheme := config.run.dir.partition(":/")[0]) != config.run.dir and scheme.isalnum():
        raise BadInput(f"run.dir={config.run.dir}: neither a path nor a URL; a URL begins with {scheme}://")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    secrets = [key for key in parse_qs(parts.query, keep_blank_values=True) if any(word in key.lower() for word in SECRET_WORDS)]
    in_s3 = parts.scheme.startswith("s3") and ("@" in url.partition("?")[0] or ":" in parts.netloc)  # a secret may hold a slash
    if secrets or in_s3 or parts.password is not None:
        what = ", ".join(secrets) or "a user or a password"
        raise BadInput(
            f"run.dir={parts.scheme}://...: holds credentials ({what}), which would be saved with the run and logged; "
            "leave them to the environment, such as AWS_PROFILE, or to the machine's role"
        )
    if parts.scheme == "file":
        raise BadInput(f"run.dir={url}: give a path on a disk without file://")


def _check_schedule(key: str, value: Any, num_iterations: int) -> None:
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, list) and len(value) != num_iterations:
        raise BadInput(f"{key} has {len(value)} values for spin.num_iterations={num_iterations}; give one value, or one per iteration")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number <= 0:
            raise BadInput(f"{key}={value}: must be a positive number, or a list of them")


def _one_of(value: Any, iteration: int) -> float:
    return float(value[iteration] if isinstance(value, list) else value)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, in the order of the dataclasses."""
    flat = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        flat |= flatten(value, f"{prefix}{entry.name}.") if is_dataclass(value) else {f"{prefix}{entry.name}": value}
    return flat


def differences(config: Config, saved: dict[str, Any]) -> list[str]:
    """What a run directory's config.json says otherwise: one "key: saved -> present" per key that changes the result."""
    now, then = flatten(config), _flatten_dict(saved)
    keys = [key for key in sorted(now.keys() | then.keys()) if not key.startswith(RESUME_MAY_CHANGE)]
    return [f"{key}: {then.get(key)} -> {now.get(key)}" for key in keys if now.get(key) != then.get(key)]


def _flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def to_json(config: Config, command: str) -> str:
    """The resolved config and the command that uses it as indented JSON, for config.json."""
    return json.dumps({"command": command, **dataclasses.asdict(config)}, indent=2) + "\n"
