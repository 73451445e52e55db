"""The clone that every launch of this folder starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from multihost.clone import make_clone
from multihost.hosts import Host, two_hosts, why_not


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    make_clone(folder)
    return folder


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    if (reason := why_not()) is not None:
        pytest.skip(f"two hosts on this machine: {reason}")
    with two_hosts(tmp_path_factory.mktemp("hosts") / "etc") as pair:
        yield pair
