"""A folder is built beside its place and renamed into it, so that what stands there is always whole, kill or not."""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sisa_dist.config import UserError


@contextmanager
def built_beside(folder: Path) -> Iterator[Path]:
    """An empty folder to fill. It replaces `folder` when the block ends well and is removed when it raises.

    A kill leaves `folder` as it was, or at worst (inside the two renames of a replacement) absent; the leftovers
    FOLDER.building and FOLDER.old are removed by the next build. One process at a time, else UserError.
    """
    building, old = (folder.with_name(folder.name + suffix) for suffix in (".building", ".old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another process is preparing it: wait until it is done"
    with locked(folder.with_name(folder.name + ".lock"), busy):
        for leftover in (building, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        building.mkdir()
        try:
            yield building
        except BaseException:
            shutil.rmtree(building)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(building, folder)
        if old.exists():
            shutil.rmtree(old)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the file `path` locked, and removes it at the end; UserError(`busy`) where another process holds it.

    The kernel drops the lock of a killed process.
    """
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(busy) from None
        except OSError as error:  # some network file systems have no locks, and most folders have no rival
            warnings.warn(f"{path}: cannot be locked ({error}): let one process at a time work here", stacklevel=2)
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            break
        os.close(handle)  # its holder removed the file between our open and our lock
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
