"""A folder of blocks read from far away, shared by the processes of a host and kept below a size: the oldest go first.

A block's file is named by its hash, so a block belongs to no run, and what lies there is what it should be or is
thrown away: the hash is taken again on every read. A kill at any instant leaves whole blocks, a partial file that the
next clearing removes, and at worst a `usage` that is too large, which the same clearing counts anew. Where the disk is
full or fails, blocks are not kept, and the run goes on over the network.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sisa_dist.config import UserError

log = logging.getLogger(__name__)

_KEEP = 0.9  # of the limit, after a clearing: it looks at every file, and must not be needed at every write
_STALE = 3600.0  # seconds after which a lock has no owner any more


class BlockCache:
    """At most `limit` bytes in `folder`. `hash` gives a block's name, in hex."""

    def __init__(self, folder: str | Path, *, limit: int, hash: Callable[[bytes], str]) -> None:
        self.folder, self.limit, self._hash = Path(folder), limit, hash
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(self.folder / "lock"):
                pass
        except OSError as error:
            raise UserError(
                f"data.cache_folder: {self.folder} cannot be used ({error.strerror or error}): name another"
            ) from None

    def get(self, key: str) -> bytes | None:
        """The block named `key`, which counts as used now; None where it is not here or damaged."""
        path = self._path(key)
        try:
            payload = path.read_bytes()
            if self._hash(payload) != key:
                log.warning("%s: damaged, removed", path)
                path.unlink(missing_ok=True)
                return None
            with _gone_is_fine():
                os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._goes_without(error)
            return None
        return payload

    def put(self, key: str, payload: bytes) -> bool:
        """Keeps a block. False: it is larger than the whole cache may be, or the disk would not take it."""
        if len(payload) > self.limit:
            return False
        path = self._path(key)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            # Written under the lock too: a clearing must not count a file that is still growing.
            with self._locked(self.folder / "lock"):
                if path.exists():
                    return True
                # Counted first: a kill here leaves a count too high and never a folder too full.
                self._make_room(len(payload))
                try:
                    partial.write_bytes(payload)
                    os.replace(partial, path)
                except OSError:
                    partial.unlink(missing_ok=True)
                    raise
        except OSError as error:
            self._goes_without(error)
            return False
        return True

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """One thread of one process of the host at a time; the kernel lets go of what a killed one held."""
        path = self._path(key).with_suffix(".fetching")
        with ExitStack() as held:
            try:
                path.parent.mkdir(exist_ok=True)
                held.enter_context(self._locked(path))
                held.enter_context(_removed(path))
            except OSError as error:  # then several may fetch the same
                self._goes_without(error)
            yield

    def size(self) -> int:
        """Bytes of blocks and partial files that lie in the folder, counted now."""
        return sum(size for _, size, _ in self._files())

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.block"

    def _make_room(self, number: int) -> None:
        """Counts `number` more bytes, and removes the blocks used longest ago where they would be too many."""
        usage = self.folder / "usage"
        try:
            used = int(usage.read_text())
        except (FileNotFoundError, ValueError):
            used = self.limit + 1  # not known: count
        if used + number > self.limit:
            used = self._clear(max(0, int(self.limit * _KEEP) - number))
        new = self.folder / "usage.new"
        new.write_text(str(used + number))
        os.replace(new, usage)

    def _clear(self, most: int) -> int:
        """Removes what a killed process left, and of the rest the oldest down to `most`; bytes left. Under the lock."""
        files, now, used = [], time.time(), 0
        for path, size, mtime in self._files():
            if path.endswith(".partial") or (path.endswith(".fetching") and now - mtime > _STALE):
                with _gone_is_fine():
                    os.unlink(path)
            else:
                files.append((mtime, size, path))
                used += size
        for _, size, path in sorted(files):
            if used <= most:
                break
            if path.endswith(".block"):
                with _gone_is_fine():
                    os.unlink(path)
                used -= size
        return used

    def _files(self) -> Iterator[tuple[str, int, float]]:
        """(path, bytes, time of its last use) of all that lies in the folders of blocks."""
        for entry in os.scandir(self.folder):
            if entry.is_dir():
                for file in os.scandir(entry.path):
                    with _gone_is_fine():
                        stat = file.stat()
                        yield file.path, stat.st_size, stat.st_mtime

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        while True:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                same = False  # its holder may have removed the file while we waited: then this lock keeps nobody out
                with _gone_is_fine():
                    same = os.fstat(handle).st_ino == os.stat(path).st_ino
                if same:
                    yield
                    return
            finally:
                os.close(handle)

    def _goes_without(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "data.cache_folder: %s: %s: what does not fit or cannot be read there is fetched again (said once)",
                self.folder,
                error.strerror or error,
            )


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """`path` goes at the end, where it can."""
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def _gone_is_fine() -> suppress:
    """Another process may remove a block or a lock at any time."""
    return suppress(FileNotFoundError)
