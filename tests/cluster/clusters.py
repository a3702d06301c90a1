"""Ray clusters over the hosts of a lab, and jobs that are submitted to them as people do it."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hosts import Host, Lab
from watching import wait_for

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
PLAYS, LEARNS = {"role": "sampler"}, {"role": "learner"}
PLACED = ("sampler.label_selector={role: sampler}", "learner.label_selector={role: learner}")
START_S = 180.0
MAX_STARTS = 3
"""Ray gives a node 30 s to come up, too few on a very busy machine."""


class Cluster:
    """A head without CPUs of its own for anybody's actors, nodes that join it, and a desk from which jobs are submitted."""

    def __init__(self, lab: Lab):
        self.lab, self._logs = lab, lab.shared / "logs"
        self._logs.mkdir(exist_ok=True)
        self._token = secrets.token_hex(32)
        self.desk, self.nodes = lab.host("desk"), {}
        self._bring_token(self.desk)
        self.start_head()

    def start_head(self) -> None:
        self.head = self.lab.host("head")
        self._bring_token(self.head)
        self._start(self.head, "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")

    def join(self, name: str, *, cpus: int = 2, labels: dict[str, str] | None = None, clock_s: float = 0.0) -> Host:
        """A new host that joins; its clock may be off."""
        host = self.nodes[name] = self.lab.host(name, clock_s=clock_s)
        self._bring_token(host)
        said = ",".join(f"{label}={value}" for label, value in (labels or {}).items())
        self._start(host, f"--address={self.head.address}:6379", f"--num-cpus={cpus}", *([f"--labels={said}"] if said else []))
        return host

    def _bring_token(self, host: Host) -> None:
        (host.home / ".ray").mkdir(parents=True, exist_ok=True)
        (host.home / ".ray/auth_token").write_text(self._token)

    def _start(self, host: Host, *words: str) -> None:
        # Each host counts the memory of the one machine they all are: Ray's watch over it would kill a worker of a host that has enough.
        log = self._logs / f"{host.name}.log"
        for _ in range(MAX_STARTS):
            log.unlink(missing_ok=True)
            process = host.start(
                RAY, "start", "--block", f"--node-ip-address={host.address}", *words, log=log, RAY_AUTH_MODE="token", RAY_worker_niceness="0",
                RAY_memory_monitor_refresh_ms="0",
            )
            wait_for(
                lambda: process.poll() is not None or "Ray runtime started" in log.read_text(), f"Ray on {host.name}", START_S  # noqa: B023
            )
            if process.poll() is None:
                return
        raise AssertionError(log.read_text()[-3000:])

    def submit(self, *arguments: str) -> subprocess.Popen:
        """From the desk, in the folder that all share."""
        return self.desk.start(
            ROOT / "cluster/submit.sh", *arguments, SPIN_PYTHON=sys.executable, RAY_API_SERVER_ADDRESS=f"http://{self.head.address}:8265"
        )


def finished(job: subprocess.Popen, timeout_s: float = 900.0) -> str:
    """What a job has said that has ended well."""
    output, _ = job.communicate(timeout=timeout_s)
    assert job.returncode == 0, f"exit code {job.returncode}: {output[-4000:]}"
    return output


def words(config: str, name: str, *more: str) -> Sequence[str]:
    return [str(ROOT / config), f"run.name={name}", *PLACED, *more]
