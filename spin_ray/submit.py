"""`python -m spin_ray.submit config.yaml [key=value ...] [--options]`: run it as a Ray job, follow its log, exit with its exit code.

The package is at the same path on all nodes, or in their image, or shipped (`--working-dir`). Secrets never travel: `--secret` names a
file that the cluster has.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from spin_ray import __version__
from spin_ray.background import in_background
from spin_ray.config import load_config
from spin_ray.errors import BadInput, RunStopped, in_one_line
from spin_ray.exits import EXIT_INTERRUPTED, ends_in_one_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
AGENT_TIMEOUT_S = 180.0
CONNECT_S = 15.0
ASK_EVERY_S, SILENT_S = 15.0, 120.0
_REMEDY = "start one with `ray start --head`, or set RAY_API_SERVER_ADDRESS"


SHIPPED_NOT = ("runs", ".venv", ".git", "wandb", "**/__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache", "*.egg-info", "build")
"""Of a folder that is shipped: what only this machine needs."""
STOP_WAIT_S = 360
"""What `ray job stop` gives a job before it kills it. Ray's 3 s are too few: the main player ends its step and saves its progress."""
PASSED_ON = ("WANDB_MODE", "HF_HUB_OFFLINE")
"""Of this shell's environment: what says how to run, and is no secret."""
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="cluster/submit.sh", description="Submit a run to a Ray cluster and follow it.", allow_abbrev=False)
    made.add_argument("config")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    made.add_argument("--working-dir", type=Path, metavar="FOLDER", help="ship this checkout; the cluster has what it depends on")
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the job's processes; everybody can read it")
    made.add_argument("--secret", action="append", default=[], metavar="NAME=FILE", help="for the driver: what a file on the cluster holds")
    made.add_argument("--metadata", action="append", default=[], metavar="NAME=VALUE", help="shown by `ray job list`")
    made.add_argument("--num-cpus", type=float, help="that the driver reserves; 0 unless given")
    made.add_argument("--num-gpus", type=float, help="that the driver reserves; it computes on none")
    made.add_argument("--memory", type=float, metavar="GIB", help="that the driver reserves")
    made.add_argument("--resource", action="append", default=[], metavar="NAME=AMOUNT", help="that the driver's node must have")
    made.add_argument("--label", action="append", default=[], metavar="NAME=VALUE", help="of the driver's node")
    return made


async def submit(arguments: list[str]) -> int:
    """Submit `spin_ray run` with these arguments; returns the job's exit code (1 where the job died without one).

    Raises BadInput for a config that `run` would refuse, before the cluster stores anything of it, and if there is no cluster.
    """
    if not arguments:
        raise BadInput("give a config file, such as conf/demo.yaml")
    options = parser().parse_intermixed_args(arguments)
    job = job_of(options)
    address = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    client = await _connect(address)
    number = await _submitted(client, address, job)
    print(f"submitted {number} to {address}", flush=True)
    if options.no_wait:
        print(f"follow it with `ray job logs --follow {number}`, end it with `ray job stop {number}`; the run goes on when submitted again")
        return 0
    return await _followed(client, address, number)


def job_of(options: argparse.Namespace) -> dict[str, Any]:
    """What `submit_job` is told. Raises BadInput for what it or `run` would refuse."""
    config, _ = load_config(options.config, options.overrides)
    env = _pairs("--env", options.env)
    if telling := [name for name in env if _SECRET.search(name)]:
        name = telling[0]
        raise BadInput(f"--env {name}: everybody on the cluster could read it; put it into a file there and give --secret {name}=FILE")
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    env = {**passed_on, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env}
    runtime: dict[str, Any] = {"env_vars": env}
    shipped, cwd = options.working_dir, Path.cwd()
    if shipped:
        if not (shipped / "spin_ray/__main__.py").is_file():
            raise BadInput(f"--working-dir {shipped}: no checkout of spin_ray; it is shipped to the cluster and run from there")
        if not Path(options.config).resolve().is_relative_to(shipped.resolve()):
            raise BadInput(f"{options.config}: not in --working-dir {shipped}, so the cluster would not have it")
        if not config.on_object_store and not Path(config.run.dir).is_absolute():
            raise BadInput(
                f"run.dir={config.run.dir}: with --working-dir it must be an absolute path that all nodes see, or a URL; what is shipped "
                "goes with the job"
            )
        runtime |= {"working_dir": str(shipped.resolve()), "excludes": list(SHIPPED_NOT)}
        program, begin = [os.environ.get("SPIN_PYTHON", "python")], ""
        arguments = [str(Path(options.config).resolve().relative_to(shipped.resolve())), *options.overrides]
    else:
        program, begin = [sys.executable], f"cd {shlex.quote(str(cwd))} && "  # relative paths mean here, not Ray's working directory
        arguments = [options.config, f"run.dir={cwd}/runs", *options.overrides]
    secrets = "".join(f'export {name}="$(cat {shlex.quote(file)})" && ' for name, file in _pairs("--secret", options.secret).items())
    job = {
        "entrypoint": f"{begin}{secrets}exec {shlex.join([*program, '-m', 'spin_ray', 'run', *arguments])}", "runtime_env": runtime,
        "metadata": {"run": config.run.name, "config": options.config, "spin_ray": __version__, **_pairs("--metadata", options.metadata)},
        "entrypoint_num_cpus": options.num_cpus, "entrypoint_num_gpus": options.num_gpus,
        "entrypoint_memory": options.memory and int(options.memory * 2**30),
        "entrypoint_resources": {name: _number("--resource", amount) for name, amount in _pairs("--resource", options.resource).items()},
        "entrypoint_label_selector": _pairs("--label", options.label),
    }
    return {key: value for key, value in job.items() if value}


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    for one in given:
        if not re.fullmatch(r"[^=]+=.+", one, re.DOTALL):
            raise BadInput(f"{option} {one}: give NAME=VALUE")
    return dict(one.split("=", 1) for one in given)


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadInput(f"{option} {text}: no number") from error


async def _submitted(client: JobSubmissionClient, address: str, job: dict[str, Any]) -> str:
    """The job's id."""
    begun = time.monotonic()
    while True:
        try:
            return client.submit_job(**job)
        except ValueError as error:  # what is shipped is too large
            raise BadInput(in_one_line(error)) from error
        except RuntimeError as error:  # a head that has just started
            if "No available agent" not in str(error) or time.monotonic() > begun + AGENT_TIMEOUT_S:
                raise
            await asyncio.sleep(2)
        except OSError as error:
            raise RunStopped(f"{address}: the cluster's job server is gone: {in_one_line(error)}; start the cluster again") from error


async def _followed(client: JobSubmissionClient, address: str, job: str) -> int:
    """Its log as it comes, and then its exit code."""
    showing = asyncio.ensure_future(_shown(client, job))
    try:
        while not (await asyncio.wait([showing], timeout=ASK_EVERY_S))[0]:
            with suppress(RuntimeError):  # is an answer too; a head without power does not even close the connection of the log
                await _answered(client.get_job_status, job)
        await showing
        while not (status := await _answered(client.get_job_status, job)).is_terminal():
            await asyncio.sleep(0.5)
        code = (await _answered(client.get_job_info, job)).driver_exit_code
    except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; of a log that breaks off Ray makes a RuntimeError
        raise RunStopped(
            f"{address}: the cluster's job server no longer answers: {in_one_line(error)}; the job may go on: "
            f"`ray job logs --follow {job}`; submit the same again where it has ended"
        ) from error
    if status is JobStatus.STOPPED:
        print(f"{job} was stopped; submit the same again to go on")
        return EXIT_INTERRUPTED
    if status is JobStatus.SUCCEEDED:
        return 0
    return 1 if code is None or code < 0 else code


async def _shown(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


async def _answered(ask: Callable[[str], Any], job: str) -> Any:
    """What the job server answers. Raises TimeoutError if it says nothing for SILENT_S."""
    try:
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(in_background(ask, job))), SILENT_S)
    except TimeoutError as error:
        raise TimeoutError(f"silent for {SILENT_S:g} s") from error


async def _connect(address: str) -> JobSubmissionClient:
    """The cluster's job server. Raises BadInput if none answers within CONNECT_S, or if it does not want this user."""
    _no_proxy_for(urlsplit(address).hostname or address)
    waiting = in_background(JobSubmissionClient, address)
    try:
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(waiting)), CONNECT_S)
    except TimeoutError as error:
        raise BadInput(f"{address}: no answer of a Ray cluster within {CONNECT_S:g} s; {_REMEDY}") from error
    except ConnectionError as error:
        raise BadInput(f"no Ray cluster at {address}: {_REMEDY}") from error
    except (RuntimeError, ValueError) as error:  # something else listens there; a token is missing; no such scheme
        raise BadInput(f"no Ray cluster at {address} takes jobs from here: {in_one_line(error)}; {_REMEDY}") from error


def _no_proxy_for(host: str) -> None:
    """A proxy of this shell is for what lies outside; the cluster's head may not be reached through it."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))


if __name__ == "__main__":
    sys.exit(ends_in_one_line("submit", lambda: asyncio.run(submit(sys.argv[1:]))))
