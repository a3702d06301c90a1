"""Scripts that are the ranks of a group, without Ray."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(script: str, *arguments: object, world_size: int, logs: Path) -> None:
    """Run a script of this folder as so many processes, until all have ended well."""
    common = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world_size),
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    files = [logs / f"rank_{rank}.log" for rank in range(world_size)]
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=file.open("w"), stderr=subprocess.STDOUT)
        for rank, file in enumerate(files)
    ]
    try:
        codes = [rank.wait(timeout=1800) for rank in ranks]  # a hung collective ends here
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size, [file.read_text()[-3000:] for file, code in zip(files, codes, strict=True) if code]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
