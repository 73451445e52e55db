"""Where prepared data lies: a local folder or a URL that fsspec knows (http, https, s3, …), under one spelling.

It joins names and tells the two apart; reading is for index.py and fetch.py.
"""

from __future__ import annotations

import os
from pathlib import Path

Place = str | Path


def is_url(place: Place) -> bool:
    return "://" in str(place)


def join(folder: Place, name: str) -> str:
    """`name` inside `folder`, or `name` itself where it is absolute or a URL: an index may refer to other places."""
    return name if is_url(name) or os.path.isabs(name) else f"{str(folder).rstrip('/')}/{name}"


def data_place(folder: str) -> Place:
    """A folder as a config spells it: a URL stays text, for Path would eat one of its slashes."""
    return folder.rstrip("/") if is_url(folder) else Path(folder)
