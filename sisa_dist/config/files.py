"""What is written is whole: small files replaced at once, and what must outlive a power cut synced to the disk."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

from sisa_dist.config.errors import UserError


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes `content` beside `path` and renames it. Raises UserError where that fails; `path` is then as it was.

    Of several processes that do so at once, on whatever hosts, the last has its way.
    """
    beside = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}): make room or mend the folder") from None


def sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
