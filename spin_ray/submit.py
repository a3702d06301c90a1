"""`python -m spin_ray.submit config.yaml [key=value ...]`: run it as a Ray job, follow its log, exit with its exit code."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from spin_ray.background import in_background
from spin_ray.config import load_config
from spin_ray.errors import BadInput, RunStopped, in_one_line
from spin_ray.exits import ends_in_one_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
AGENT_TIMEOUT_S = 180.0
CONNECT_S = 15.0
_REMEDY = "start one with `ray start --head`, or set RAY_API_SERVER_ADDRESS"


async def submit(arguments: list[str]) -> int:
    """Submit `spin_ray run` with these arguments; returns the job's exit code (1 where the job died without one).

    Raises BadInput for a config that `run` would refuse, before the cluster stores anything of it, and if there is no cluster.
    """
    if not arguments:
        raise BadInput("give a config file, such as conf/demo.yaml")
    load_config(arguments[0], arguments[1:])
    address = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    client = await _connect(address)
    command = shlex.join([sys.executable, "-m", "spin_ray", "run", *arguments])
    entrypoint = f"cd {shlex.quote(os.getcwd())} && exec {command}"  # relative paths mean here, not Ray's working directory
    begun = time.monotonic()
    passed_on = {name: os.environ[name] for name in ("WANDB_MODE", "HF_HUB_OFFLINE") if name in os.environ}
    while True:
        try:
            job = client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": passed_on})
            break
        except RuntimeError as error:  # a head that has just started
            if "No available agent" not in str(error) or time.monotonic() > begun + AGENT_TIMEOUT_S:
                raise
            await asyncio.sleep(2)
        except ConnectionError as error:
            raise RunStopped(f"{address}: the cluster's job server is gone: {in_one_line(error)}; start the cluster again") from error
    print(f"submitted {job} to {address}", flush=True)
    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
        while not (status := client.get_job_status(job)).is_terminal():
            await asyncio.sleep(0.5)
        code = client.get_job_info(job).driver_exit_code
    except ConnectionError as error:
        raise RunStopped(
            f"{address}: the cluster's job server no longer answers: {in_one_line(error)}; the job may go on: "
            f"`ray job logs --follow {job}`; submit the same again where it has ended"
        ) from error
    if status is JobStatus.SUCCEEDED:
        return 0
    return 1 if code is None or code < 0 else code


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
