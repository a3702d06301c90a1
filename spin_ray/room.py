"""Waiting until a cluster that was joined has room for a run: nodes may still come, and others may still use what is there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from spin_ray.errors import BadInput
from spin_ray.nodes import Actors, DoNotFit, Node, check_fit, in_amounts

PATIENCE_S = 1800.0
"""What `cluster.wait_s` is unless given. Nodes with GPUs and large images take a quarter of an hour to come up."""
POLL_S, TELL_S = 1.0, 60.0
_OWN_TYPE = re.compile(r"node_[0-9a-f]{40,}|local\.node.*")
"""What Ray calls the type of a node that was started by hand."""


def wait_for_room(actors: Sequence[Actors], wait_s: float, nodes: Callable[[], Sequence[Node]], say: Callable[[str], None]) -> None:
    """Return when all actors could start at once. Until then their demand stands, so an autoscaler brings nodes for it.

    Raises BadInput with what is needed and what there is when `wait_s` seconds are over.
    """
    begun = told = time.monotonic()
    if not (group := _demand(actors)):
        return
    try:
        if group.wait(POLL_S):
            return
        while True:
            missing = _missing(actors, nodes())
            if time.monotonic() - begun >= wait_s:
                raise BadInput(f"{missing}; waited {wait_s:g} s (cluster.wait_s)")
            if told == begun or time.monotonic() - told > TELL_S:
                say(f"waiting, {wait_s - (time.monotonic() - begun):.0f} s more at most (cluster.wait_s): {missing}")
                told = time.monotonic()
            if group.wait(min(POLL_S, wait_s)):
                return say(f"there is room, after {time.monotonic() - begun:.0f} s")
    finally:
        remove_placement_group(group)


def _demand(actors: Sequence[Actors]) -> PlacementGroup | None:
    each = [(kind, {name: amount for name, amount in kind.each.items() if amount}) for kind in actors]
    bundles = [(amounts, dict(kind.selector)) for kind, amounts in each if amounts for _ in range(kind.number)]
    if not bundles:
        return None
    return placement_group([amounts for amounts, _ in bundles], bundle_label_selector=[selector for _, selector in bundles])


def _missing(actors: Sequence[Actors], nodes: Sequence[Node]) -> str:
    try:
        check_fit(nodes, actors)
    except DoNotFit as error:
        return str(error)
    wanted = {name: sum(kind.number * kind.each.get(name, 0) for kind in actors) for name in ("GPU", "CPU")}
    return f"others use this cluster: the run needs {in_amounts(wanted)}, free are {in_amounts(ray.available_resources())}"


def nodes_may_come() -> bool:
    """Whether somebody brings this cluster its nodes, an autoscaler or KubeRay: the nodes' types then have names."""
    worker = ray._private.worker.global_worker
    if is_autoscaler_v2(fetch_from_server=True, gcs_client=worker.gcs_client):
        status = get_cluster_status(worker.gcs_client.address)
        types = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    else:
        found = worker.gcs_client.internal_kv_get(b"__autoscaling_status", namespace=None)
        types = list((json.loads(found) if found else {}).get("autoscaler_report", {}).get("active_nodes", ()))
    return any(not _OWN_TYPE.fullmatch(name) for name in types)
