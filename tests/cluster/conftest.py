"""Hosts of its own for every test module, where this machine can have them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts import Lab, why_not


@pytest.fixture(scope="session")
def hosts_possible() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def lab(hosts_possible, tmp_path_factory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as made:
        yield made
