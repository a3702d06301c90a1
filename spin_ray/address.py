"""Is there a Ray cluster at an address? Ray itself would ask for ten minutes before it says no."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from spin_ray.errors import BadInput

PATIENCE_S = 10.0
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""HTTP/2's preface and empty settings: whatever speaks gRPC, as Ray's head does, answers with its own settings."""
_SETTINGS = 4


def check_ray_address(address: str, name: str) -> None:
    """Raise BadInput if nothing that could be a Ray head listens at `host:port` (or ray://host:port). `name`: where it was given.

    Takes at most PATIENCE_S. "auto" is Ray's to resolve first.
    """
    remedy = "start a cluster (ray start --head) and give its address, or unset it for a Ray of this run's own"
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if parts.scheme in ("http", "https"):
        raise BadInput(f"{name}={address}: that is where jobs are submitted (ray job submit --address); {remedy}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = parts.hostname, None
    if not host or not port:
        raise BadInput(f"{name}={address}: no address of a Ray cluster; it has the form host:6379; {remedy}")
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # its head says nothing to one without a certificate
    try:
        with socket.create_connection((host, port), timeout=PATIENCE_S / 2) as connection:
            connection.settimeout(PATIENCE_S / 2)
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        raise BadInput(f"{name}={address}: no Ray cluster answers there ({error.strerror or error}); {remedy}") from error
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise BadInput(f"{name}={address}: something else than a Ray cluster listens there; {remedy}")
