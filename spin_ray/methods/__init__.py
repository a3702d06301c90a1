"""What differs between SPIN, SFT and DPO: which pairs, which reference, which loss, when an iteration ends. A file for each.

The driver asks a `Method`, and nobody else knows one by name; the learner is told what to do by the commands that come of it.
"""

from spin_ray.config import Config
from spin_ray.methods.dpo import Dpo
from spin_ray.methods.method import Method
from spin_ray.methods.sft import Sft
from spin_ray.methods.spin import Spin

__all__ = ["Method", "method_of"]


def method_of(config: Config) -> Method:
    """The method that `config.method` names."""
    return {"spin": Spin, "sft": Sft, "dpo": Dpo}[config.method](config)
