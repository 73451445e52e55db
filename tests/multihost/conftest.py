"""The clone that every launch of this folder starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from multihost.clone import make_clone


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    make_clone(folder)
    return folder
