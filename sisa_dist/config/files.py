"""A small file replaced as a whole: a reader sees the old one or the new one, and a full disk is one line."""

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
