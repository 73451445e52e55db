"""How many bins each group of a large split fills, kept beside its index: planning takes 20 minutes for 10¹² tokens.

It is a copy of what can be made again: where the folder cannot be written, or the file is not what was written, it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.index import Index, member_hash
from data_pipeline.order import Int64

_WORTH_KEEPING = 1000  # groups, about a second's planning


def kept_counts(index: Index, name: str, groups: int, make: Callable[[], Int64]) -> Int64:
    """`make()`, int64 [2, groups], or what it was before for the same tokens under this `name` (of what it depends on).

    The file holds 16 bytes of hash over the index's fingerprint and the counts, then the counts.
    """
    if "://" in index.folder or groups < _WORTH_KEEPING:
        return make()
    path = Path(index.folder) / f"{name}.counts"
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    if len(content) == 16 * (groups + 1) and content[:16] == _hash(index, content[16:]):
        return np.frombuffer(content[16:], dtype="<i8").reshape(2, groups).astype(np.int64)
    counts = make()
    payload = counts.astype("<i8").tobytes()
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the ranks of a host write at once
    try:
        beside.write_bytes(_hash(index, payload) + payload)
        os.replace(beside, path)
    except OSError:  # another's folder, or a full disk: the next start plans again
        beside.unlink(missing_ok=True)
    return counts


def _hash(index: Index, payload: bytes) -> bytes:
    return member_hash(index.fingerprint.encode() + payload)
