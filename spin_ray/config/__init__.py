"""Every setting of a run: names, types, defaults and what they mean. YAML files hold only what differs.

Each file has one or two sections: the keys, each with its unit, its default and its limits, and below them what else a section
checks. `schema.py` puts the sections together and checks across them, `load.py` is the only way from a file to a `Config`.
A config is read once, checked, saved with the run and never written again. Importing it imports neither torch nor ray.
"""

from spin_ray.config.eval import EvalConfig
from spin_ray.config.guard import AuditConfig, GuardConfig
from spin_ray.config.inputs import DataConfig, ModelConfig
from spin_ray.config.keys import at
from spin_ray.config.learner import LearnerConfig
from spin_ray.config.load import load_config, read_yaml, repeat_config, with_overrides
from spin_ray.config.lora import LoraConfig
from spin_ray.config.overlap import OverlapConfig, ReferenceConfig
from spin_ray.config.placement import PlacementConfig
from spin_ray.config.run import RunConfig
from spin_ray.config.sampler import SamplerConfig
from spin_ray.config.schema import Config, check
from spin_ray.config.spin import DpoConfig, PairLossConfig, SftConfig, SpinConfig
from spin_ray.config.tracking import TrackingConfig, WandbConfig
from spin_ray.config.values import changes_result, differences, flatten, to_json
from spin_ray.config.weights import WeightsConfig

__all__ = [
    "AuditConfig", "Config", "DataConfig", "DpoConfig", "EvalConfig", "GuardConfig", "LearnerConfig", "LoraConfig", "ModelConfig",
    "OverlapConfig", "PairLossConfig", "PlacementConfig", "ReferenceConfig", "RunConfig", "SamplerConfig", "SftConfig", "SpinConfig",
    "TrackingConfig", "WandbConfig", "WeightsConfig", "at", "changes_result", "check", "differences", "flatten", "load_config", "read_yaml",
    "repeat_config",
    "to_json", "with_overrides",
]
