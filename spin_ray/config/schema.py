"""All sections together, and what holds across them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path

from spin_ray.config.cluster import ClusterConfig
from spin_ray.config.eval import EvalConfig
from spin_ray.config.guard import AuditConfig, GuardConfig
from spin_ray.config.inputs import DataConfig, ModelConfig
from spin_ray.config.keys import check_limits, check_schedules, one_of
from spin_ray.config.learner import LearnerConfig
from spin_ray.config.lora import LoraConfig
from spin_ray.config.overlap import OverlapConfig, ReferenceConfig
from spin_ray.config.placement import PlacementConfig
from spin_ray.config.run import RunConfig
from spin_ray.config.sampler import SamplerConfig
from spin_ray.config.spin import DpoConfig, SftConfig, SpinConfig
from spin_ray.config.tracking import TrackingConfig
from spin_ray.config.weights import WeightsConfig
from spin_ray.errors import BadInput

PRESETS = ("paper", "careful")
"""Files of the package, in presets/."""
REQUIRED = ("model.path", "data.train")
"""What every command needs and nobody can guess."""


@dataclass
class Config:
    preset: str = one_of("", choices=("", *PRESETS))
    """Values under those of the file, of spin_ray/presets/: paper, or careful, which holds log p(y) up and knows when to stop."""
    method: str = one_of("spin", choices=("spin", "sft", "dpo"))
    """spin: self-play; sft: supervised fine-tuning on the same rows; dpo: on preference rows (prompt, chosen, rejected)."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    spin: SpinConfig = field(default_factory=SpinConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def scorer(self) -> str:
        """Who computes the reference log-probs: `reference.scorer`, decided."""
        return decided_scorer(self.reference.scorer, self.model.quantization)

    @property
    def on_object_store(self) -> bool:
        return self.run.on_object_store

    @property
    def run_path(self) -> Path:
        """The run's folder; on an object store the one that stands for it on every node."""
        return self.run.path

    def num_steps(self, num_pairs: int, num_epochs: int) -> int:
        """Optimizer steps on so many pairs: every epoch ends with a batch of its own, however small."""
        steps = num_epochs * -(-num_pairs // self.learner.batch_pairs)
        return min(steps, self.run.max_steps or steps)


def decided_scorer(scorer: str, quantization: str) -> str:
    """What `reference.scorer` comes to."""
    return ("frozen" if quantization else "opponent") if scorer == "auto" else scorer


def check(config: Config) -> None:
    """Raise BadInput for the first value that makes no sense, with the arithmetic in the message."""
    check_limits(config)
    for entry in fields(config):
        section = getattr(config, entry.name)
        if is_dataclass(section):
            iterations = 1 if entry.name in ("sft", "dpo") else config.spin.num_iterations
            check_schedules(section, entry.name, iterations)
        if hasattr(section, "check"):
            section.check()
    if config.model.quantization:
        _check_quantization(config)
    if config.learner.optimizer == "adamw_8bit":
        _need_bitsandbytes("learner.optimizer=adamw_8bit")
    sampler, learner = config.sampler, config.learner
    if sampler.is_elastic and learner.is_elastic and not _apart(sampler.label_selector, learner.label_selector):
        raise BadInput(
            f"sampler.num_replicas={sampler.num_replicas} and learner.num_workers={learner.num_workers} would take the same nodes from "
            "each other; give one of them as one number, or both a label of other nodes (sampler.label_selector, learner.label_selector)"
        )
    if config.weights.transport != "object_store":
        _check_transport(config)
    if config.overlap.mode == "lookahead" and config.reference.scorer == "learner":
        raise BadInput(
            "overlap.mode=lookahead does not go with reference.scorer=learner: blocks are played ahead so that training can start "
            "at once, but that scorer starts only when all blocks are there; choose opponent or frozen"
        )


def _apart(ours: dict[str, str], theirs: dict[str, str]) -> bool:
    """Whether two selectors want different values of one label."""
    return any(theirs.get(label, value) != value for label, value in ours.items())


def _check_transport(config: Config) -> None:
    name, other = f"weights.transport={config.weights.transport}", "weights.transport=object_store"
    if (config.lora.rank or config.model.adapter) and config.lora.sync == "adapter":
        merged = "" if config.model.adapter else ", or lora.sync=merged"
        raise BadInput(f"{name} does not go with lora.sync=adapter, of which only an adapter travels; set {other}{merged}")
    if config.placement.mode == "shared":
        raise BadInput(f"{name} does not go with placement.mode=shared, where both players are on the same devices; set {other}")
    if config.weights.timeout_s > config.sampler.request_timeout_s:
        raise BadInput(
            f"weights.timeout_s={config.weights.timeout_s:g} is longer than "
            f"sampler.request_timeout_s={config.sampler.request_timeout_s:g}, after which the replica would count as hanging"
        )


def _check_quantization(config: Config) -> None:
    name = f"model.quantization={config.model.quantization}"
    if not config.lora.rank:
        raise BadInput(f"{name} needs lora.rank: weights of 4 bits cannot be trained, an adapter over them can")
    if config.learner.zero_stage == 3:
        raise BadInput(f"{name} does not go with learner.zero_stage=3, which would shard 4-bit weights as if they were numbers; set 2")
    _need_bitsandbytes(name)


def _need_bitsandbytes(key: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise BadInput(f"{key} needs the package bitsandbytes, which is not installed: pip install bitsandbytes")
