"""Hosts of a cluster on this machine: each has an address, processes, /tmp, /dev/shm and a clock of its own; what they share is a folder.

    lab ── hub (a switch, in a network namespace of its own)
            ├── head   10.0.0.1
            ├── play1  10.0.0.2    a network, mount, process, IPC and host name namespace each
            └── ...

A power cut ends every process of a host at once, and nobody hears of it: the cable goes first, so no connection is closed.
Needs root and iproute2.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil

NOBODY = "02:00:00:00:00:fe"
"""A hardware address that no host has: what is sent there is lost, as on a cut line."""
INSTALLED = [Path(__file__).parents[2], Path(sys.prefix), *map(Path, filter(None, [os.environ.get("TORCH_EXTENSIONS_DIR")]))]
"""What every host has, as from one image."""
INTERFACE = "eth0"
BOOT_S = 20.0
_BOOT = """
set -e
mount --make-rprivate /
mount --bind {names} /etc/hosts
for seen in {seen}; do mkdir -p "{tmp}${{seen#/tmp}}"; mount --bind "$seen" "{tmp}${{seen#/tmp}}"; done
mount --rbind {tmp} /tmp
mount -t tmpfs -o size=2g tmpfs /dev/shm
hostname {name}
touch {booted}
while :; do sleep 3600 & wait $! || true; done
"""


def why_not() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    name = f"spin-{os.getpid()}-try"
    try:
        _do("ip", "netns", "add", name)
    except RuntimeError as error:
        return f"no network namespace can be made here (are you root?): {error}"
    try:
        _do("ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/mnt")
        _do("ip", "link", "add", "spin-try", "netns", name, "type", "veth", "peer", "name", "spin-try2", "netns", name)
    except RuntimeError as error:
        return f"no host can be made of namespaces here: {error}"
    finally:
        _do("ip", "netns", "delete", name)
    return ""


class Lab:
    """A switch, and hosts at it; all of them share one folder, at the same path on each."""

    def __init__(self, folder: Path):
        self.shared = folder / "shared"
        self._folder, self._hub, self._hosts, self._names = folder, f"spin-{os.getpid()}-hub", {}, folder / "hosts"
        self._count = itertools.count(1)

    def __enter__(self) -> Lab:
        self.shared.mkdir(parents=True)
        _do("ip", "netns", "add", self._hub)
        self._in_hub("ip", "link", "add", "switch", "type", "bridge")
        self._in_hub("ip", "link", "set", "switch", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in [*self._hosts.values()]:
            host.power_cut()
        _do("ip", "netns", "delete", self._hub)

    def host(self, name: str, *, clock_s: float = 0.0) -> Host:
        """A new one, which has booted. `clock_s`: how far its clock is off."""
        number = next(self._count)
        namespace, port = f"spin-{os.getpid()}-{name}", f"port{number}"
        _do("ip", "netns", "add", namespace)
        _do("ip", "link", "add", INTERFACE, "netns", namespace, "type", "veth", "peer", "name", port, "netns", self._hub)
        self._in_hub("ip", "link", "set", port, "master", "switch", "up")
        address = f"10.0.0.{number}"
        for words in (("addr", "add", f"{address}/24", "dev", INTERFACE), ("link", "set", INTERFACE, "up"), ("link", "set", "lo", "up")):
            _do("ip", "-n", namespace, *words)
        host = Host(name, address, namespace, port, self, self._folder / name, clock_s)
        self._hosts[name] = host
        self._tell_names()
        host.boot()
        return host

    def _tell_names(self) -> None:
        """In place: every host has this very file for its /etc/hosts."""
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self._hosts.values())]
        self._names.write_text("\n".join(lines) + "\n")

    def _in_hub(self, *words: str) -> str:
        return _do("ip", "netns", "exec", self._hub, *words)

    def cut(self, host: Host, *others: Host) -> None:
        """Between the host and each of the others nothing arrives any more; the rest of the network stays."""
        for one, other in _both_ways(host, others):
            _do("ip", "-n", one.namespace, "neigh", "replace", other.address, "lladdr", NOBODY, "nud", "permanent", "dev", INTERFACE)

    def mend(self, host: Host, *others: Host) -> None:
        for one, other in _both_ways(host, others):
            _do("ip", "-n", one.namespace, "neigh", "del", other.address, "dev", INTERFACE)


class Host:
    def __init__(self, name: str, address: str, namespace: str, port: str, lab: Lab, folder: Path, clock_s: float):
        self.name, self.address, self.namespace = name, address, namespace
        self._port, self._lab, self._folder, self._clock_s = port, lab, folder, clock_s
        self._machine: subprocess.Popen | None = None
        self._first = 0
        self.home = folder / "home"
        self.home.mkdir(parents=True, exist_ok=True)

    def boot(self) -> None:
        lab, tmp, booted = self._lab, self._folder / "tmp", self.home / "booted"
        booted.unlink(missing_ok=True)
        tmp.mkdir(exist_ok=True)
        seen = [path for path in (lab.shared, self.home, *INSTALLED) if path.is_relative_to("/tmp") and path.exists()]
        script = _BOOT.format(tmp=tmp, seen=shlex.join(map(str, seen)), names=lab._names, name=self.name, booted=booted)
        self._machine = subprocess.Popen([
            "ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child",
            "--mount-proc", "bash", "-c", script,
        ])
        until = time.monotonic() + BOOT_S
        while not booted.exists():
            assert self._machine.poll() is None and time.monotonic() < until, f"{self.name} did not boot"
            time.sleep(0.05)
        (self._first,) = (child.pid for child in psutil.Process(self._machine.pid).children())

    def start(self, *words: str | Path, log: Path | None = None, **env: str) -> subprocess.Popen:
        """A process on this host; its output goes to `log`, or can be read."""
        inside = ["nsenter", "--target", str(self._first), "--mount", "--uts", "--ipc", "--net", "--pid", f"--wdns={self._lab.shared}"]
        with open(log, "ab") if log else nullcontext() as output:
            return subprocess.Popen(
                [*inside, *map(str, words)], env={**self._env(), **env}, text=True,
                stdout=output or subprocess.PIPE, stderr=output or subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )

    def run(self, *words: str | Path, timeout_s: float = 600.0, **env: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **env)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(words, process.returncode, output)

    def _env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"HOME": str(self.home), "XDG_CACHE_HOME": str(Path.home() / ".cache"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if self._clock_s:
            own |= _shifted_clock(self._clock_s)
        return {**kept, **own}

    def power_cut(self) -> None:
        """All its processes end at once; what they had open stays open for the others."""
        if self._machine is None:
            return
        with suppress(RuntimeError):
            self._lab._in_hub("ip", "link", "set", self._port, "nomaster", "down")
        self._machine.kill()
        self._machine.wait()
        self._machine = None
        with suppress(RuntimeError):
            _do("ip", "netns", "delete", self.namespace)
        del self._lab._hosts[self.name]

    def received_bytes(self) -> int:
        """By its interface since it booted."""
        return int(self.run("cat", f"/sys/class/net/{INTERFACE}/statistics/rx_bytes").stdout)

    def sent_bytes(self) -> int:
        return int(self.run("cat", f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").stdout)


def _both_ways(host: Host, others: Iterable[Host]) -> list[tuple[Host, Host]]:
    return [way for other in others for way in ((host, other), (other, host))]


def _shifted_clock(seconds: float) -> dict[str, str]:
    """For processes whose wall clock is off; their monotonic one is not."""
    (library,) = Path(find_spec("libfaketime").origin).parent.rglob("libfaketime.so.1")
    return {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+g}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def _do(*words: str) -> str:
    """Raises RuntimeError with what the command said."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
