"""Where metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field

from spin_ray.config.keys import at_least, one_of


@dataclass
class WandbConfig:
    mode: str = one_of("offline", choices=("online", "offline", "disabled"))
    """online, offline or disabled; the environment's WANDB_MODE wins."""
    project: str = "spin_ray"
    entity: str = ""
    group: str = ""
    """W&B shows the runs of a group together; a search gives its trials its own name."""
    tags: list[str] = field(default_factory=list)
    """W&B finds runs by them; the run's method is always one, of a search's and a study's runs that word too."""
    log_models: bool = False
    """Whether every theta_t goes to W&B as an artifact, with theta_0 as what it was made from: as many bytes as the models have."""


@dataclass
class TrackingConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    log_every_steps: int = at_least(1, 1)
