"""Walking a tar that may be damaged or made to do harm: what tarfile does badly with such files is met here, once.

It hands out tarfile's own entries; what they hold is for readers.py (text), foreign.py and verify.py (tokens).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_SMALL_READ = 1 << 20


class _Guarded:
    """What tarfile sees of a file: places and sizes that a damaged header names are refused where it has no such."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.failure: Exception | None = None  # of the file or its server: no damage to the tar
        self.tell = raw.tell
        here = raw.tell()
        self._size = raw.seek(0, 2)
        raw.seek(here)

    def seek(self, place: int) -> int:
        if not 0 <= place <= self._size:
            raise tarfile.ReadError("an entry ends behind the file")
        return self._raw.seek(place)

    def read(self, number: int) -> bytes:
        # A negative size reads all there is, one of 2^60 asks for as much memory before a byte is read.
        if number < 0 or (number > _SMALL_READ and number > self._size - self._raw.tell()):
            raise tarfile.ReadError("an entry is larger than the file")
        try:
            return self._raw.read(number)
        except Exception as error:
            self.failure = error
            raise


class Tar:
    """The entries of an uncompressed tar, front to back. `file` is what `extractfile` and friends are asked of."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._guarded = raw, _Guarded(raw)
        with self._as_damage():
            self.file = tarfile.open(fileobj=self._guarded, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Ends where the tar does or seems to: then `check_end`. Raises tarfile.TarError."""
        before = -1
        while True:
            with self._as_damage():
                entry = self.file.next()
            if entry is None:
                return
            self.file.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header, of millions
            if entry.size < 0 or entry.offset <= before:  # it would walk in circles
                raise tarfile.ReadError(f"an entry of {entry.size} bytes")
            before = entry.offset
            yield entry

    def check_end(self) -> None:
        """tarfile stops without a word at a damaged or cut header, and at the first end mark of two joined tars."""
        self._raw.seek(self.file.offset)
        if self._raw.read(512) != bytes(512):
            raise tarfile.ReadError("no end mark after the last member")
        while block := self._raw.read(1 << 20):
            if block.count(0) != len(block):
                raise tarfile.ReadError("data after the end mark: two tars joined?")

    @contextmanager
    def _as_damage(self) -> Iterator[None]:
        """Of a header of garbage tarfile raises whatever the parsing of numbers, text and nested headers does."""
        try:
            yield
        except (ValueError, OverflowError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
            if error is self._guarded.failure:
                raise
            raise tarfile.ReadError(f"a header cannot be read ({type(error).__name__})") from None


def leads_out(name: str) -> bool:
    """Nothing is ever unpacked, yet such a name is taken for a sign of a tar made to do harm."""
    return name.startswith("/") or ".." in name.split("/")
