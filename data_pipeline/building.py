"""A folder is built beside its place and renamed into it, so that what stands there is always whole, kill or not.

`built_beside` begins from nothing every time; `continued_beside` goes on with what a killed process left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
            _remove(leftover)
        building.mkdir()
        try:
            yield building
        except BaseException:
            shutil.rmtree(building)
            raise
        _put_in_place(building, folder)


class Interrupted(UserError):
    """What running the command again may mend, without a change to settings or input: what is done is kept."""


@contextmanager
def continued_beside(folder: Path, key: str) -> Iterator[tuple[Path, bool]]:
    """(a folder to work in, whether work under another `key` was thrown away); its `out` replaces `folder` in the end.

    What a process of the same `key` left when it was killed, interrupted or stopped by an `Interrupted` is still there;
    any other error removes it. FOLDER.building holds all of it; as built_beside, one process at a time.
    """
    building = folder.with_name(folder.name + ".building")
    work = building / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another process is preparing it: wait until it is done"
    with locked(folder.with_name(folder.name + ".lock"), busy):
        others = [path for path in building.iterdir() if path != work] if building.is_dir() else []
        for other in others:
            shutil.rmtree(other)
        _remove(folder.with_name(folder.name + ".old"))
        (work / "out").mkdir(parents=True, exist_ok=True)
        for partial in work.rglob("*.partial-*"):
            partial.unlink()
        try:
            yield work, bool(others)
        except UserError as error:
            if not isinstance(error, Interrupted):
                shutil.rmtree(building)
            raise
        _put_in_place(work / "out", folder)
        shutil.rmtree(building)


def remove_leftovers(folder: Path) -> None:
    """Of a process that was killed when `folder` was in its place already. Nothing where another is at work."""
    beside = [folder.with_name(folder.name + suffix) for suffix in (".building", ".old")]
    if any(path.exists() for path in beside):
        with suppress(UserError), locked(folder.with_name(folder.name + ".lock"), "busy"):
            for path in beside:
                _remove(path)


def _put_in_place(made: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(made, folder)
    _remove(old)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


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
