"""What is written is whole: small files replaced at once, and what must outlive a power cut synced to the disk."""

from __future__ import annotations

import os
from pathlib import Path

from sisa_dist.config.errors import UserError


def replace_file(path: Path, text: str) -> None:
    """Writes `text` beside `path` and renames it. Raises UserError where that fails; `path` is then as it was."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
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
