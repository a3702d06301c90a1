"""The cluster that a run joins."""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.config.keys import at_least


@dataclass
class ClusterConfig:
    wait_s: float | None = at_least(0, None)
    """Seconds to wait for nodes that are not there yet, or for what others of the cluster use. None: half an hour, but for nodes only
    where an autoscaler or KubeRay brings them; 0: refuse at once."""
