"""One shard, read once from front to back, against its rows of the index: every fault a line, none the last.

A shard is checked as what it is to everybody: the bytes the index names are those that were written, and the tar
around them is one that any other program reads (of others' shards, the bytes alone). Holds a member, and 60 bytes for
each name in the tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.fetch import Fetcher, RemoteSettings
from data_pipeline.index import Index, member_hash
from data_pipeline.inputs import one_line
from data_pipeline.places import is_url
from data_pipeline.tars import Tar, leads_out
from sisa_dist.config import UserError

_NOTES_BYTES = 64 << 20  # a .json beside a member is not read beyond: ten bytes a document
_COUNT_AT_ONCE = 1 << 18  # ids
_READ = 4 << 20  # at a time, over a network


@dataclass
class ShardReport:
    """`token_counts` [vocab_size] of the members that are whole."""

    token_counts: NDArray[np.int64]
    faults: list[str] = field(default_factory=list)
    members: int = 0
    tokens: int = 0


def check_shard(
    index: Index, shard: int, first: int, last: int, *, remote: RemoteSettings | None = None
) -> ShardReport:
    """Members first … last-1 of the index, which are all of that shard."""
    report = ShardReport(np.zeros(index.vocab_size, np.int64))
    path, size = index.shard_paths[shard], int(index.shards[shard]["bytes"])
    try:
        with _open(path, size, remote) as raw:
            found = raw.seek(0, 2)
            if found != size:
                report.faults.append(f"{path}: {found:,} bytes instead of {size:,}, cut short or changed")
            raw.seek(0)
            _Check(index, path, raw, report).run(first, last)
    except FileNotFoundError:
        report.faults.append(f"{path}: the shard is missing, with members {first} to {last - 1}")
    except OSError as error:
        report.faults.append(f"{path}: cannot be read ({error.strerror or one_line(error)})")
    except UserError as error:  # of the network; it names the URL
        report.faults.append(str(error))
    return report


class _Check:
    def __init__(self, index: Index, path: str, raw: IO[bytes], report: ShardReport) -> None:
        self.index, self.path, self.raw, self.report = index, path, raw, report
        self._uncounted: list[NDArray[Any]] = []
        self._num_uncounted = 0

    def run(self, first: int, last: int) -> None:
        self.member = first
        if not self.index.foreign:  # whose other entries are theirs, and were judged when they were indexed
            try:
                self._walk(last)
            except tarfile.TarError as error:
                self.report.faults.append(
                    f"{self.path}: no whole tar, other programs cannot read it ({one_line(error)})"
                )
        for left in range(self.member, last):
            self._check(left)
        self._count_all()

    def _walk(self, last: int) -> None:
        """The members that stand in the tar as they were written, and their notes."""
        notes = None
        for entry in self._entries():
            if not entry.isreg():
                continue
            if entry.name.endswith(".json"):
                notes = entry.name, self._read(entry.offset_data, min(entry.size, _NOTES_BYTES))
                continue
            stop = entry.offset_data + entry.size
            while self.member < last and (block := self.index.block(self.member)).stop <= stop:
                if (block.start, block.stop) != (entry.offset_data, stop):
                    self._fault(self.member, f"{entry.name} does not stand where the index says")
                segments = self._check(self.member)
                if segments is not None:
                    self._check_notes(self.member, entry.name, notes, segments)
                self.member, notes = self.member + 1, None

    def _entries(self) -> Any:
        """The tar's entries, with a line for each that a careful program would not unpack."""
        tar, seen = Tar(self.raw), set[int]()
        for entry in tar:
            digest = hashlib.blake2b(entry.name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            number = int.from_bytes(digest, "big")
            if leads_out(entry.name):
                self.report.faults.append(f"{self.path}: {entry.name!r}: a name that leads out of its folder")
            elif not entry.isreg() and not entry.isdir():
                self.report.faults.append(f"{self.path}: {entry.name!r}: a link or a device")
            elif number in seen:
                self.report.faults.append(f"{self.path}: {entry.name!r}: comes twice")
            seen.add(number)
            yield entry
        tar.check_end()

    def _check(self, member: int) -> NDArray[np.int64] | None:
        """The member's document lengths, where it and they are as they were written."""
        index, block = self.index, self.index.block(member)
        payload = self._read(block.start, block.stop - block.start)
        self.report.members += 1
        if len(payload) < block.stop - block.start:
            self._fault(member, "cut short")
            return None
        if member_hash(payload).hex() != block.key:
            self._fault(member, "not what was written")
            return None
        ids = np.frombuffer(payload, index.dtype)
        if ids.max() >= index.vocab_size:
            self._fault(member, f"holds the id {ids.max()} of a vocabulary of {index.vocab_size}")
            return None
        self._count(ids)
        try:
            segments = index.segments(member)
        except UserError as error:
            self.report.faults.append(f"{self.path}: member {member}: {error}")
            return None
        ends = np.flatnonzero(ids == index.eos_id) + 1
        cuts = ends if len(ends) and ends[-1] == len(ids) else np.append(ends, len(ids))
        goes_on = member + 1 < len(index.members) and bool(index.members["continued"][member + 1])
        if not np.array_equal(cuts, np.cumsum(segments)):
            self._fault(member, "its documents do not end where the index says")
            return None
        if goes_on and len(ends) and ends[-1] == len(ids):
            self._fault(member + 1, "goes on with a document that has ended")
            return None
        return segments

    def _count(self, ids: NDArray[Any]) -> None:
        """Counted many at a time: a table of the vocabulary for each small member would be most of the work."""
        self.report.tokens += len(ids)
        self._uncounted.append(ids)
        self._num_uncounted += len(ids)
        if self._num_uncounted >= _COUNT_AT_ONCE:
            self._count_all()

    def _count_all(self) -> None:
        if self._uncounted:
            ids = np.concatenate(self._uncounted).astype(np.int64)
            self.report.token_counts += np.bincount(ids, minlength=self.index.vocab_size)
        self._uncounted, self._num_uncounted = [], 0

    def _check_notes(
        self, member: int, name: str, notes: tuple[str, bytes] | None, segments: NDArray[np.int64]
    ) -> None:
        index = self.index
        wanted = {
            "dtype": index.dtype.str,
            "tokens": int(index.tokens[member]),
            "segments": segments.tolist(),
            "continued": bool(index.members["continued"][member]),
        }
        if notes is None or notes[0].removesuffix(".json") != name.removesuffix(".bin"):
            self._fault(member, f"no .json stands before {name}")
            return
        try:
            said = json.loads(notes[1])
        except (ValueError, RecursionError):
            said = None
        if said != wanted:
            self._fault(member, f"{notes[0]} does not say what the index does")

    def _read(self, start: int, number: int) -> bytes:
        self.raw.seek(start)
        return self.raw.read(number)

    def _fault(self, member: int, what: str) -> None:
        self.report.faults.append(f"{self.path}: member {member}: {what}")


def _open(path: str, size: int, remote: RemoteSettings | None) -> IO[bytes]:
    if not is_url(path):
        return open(path, "rb", buffering=1 << 20)
    return io.BufferedReader(_Ranges(Fetcher(remote or RemoteSettings()), path, size), _READ)


class _Ranges(io.RawIOBase):
    """A file at a URL, of a size that is known, read by ranges; the whole of it held where its server has none."""

    def __init__(self, fetcher: Fetcher, url: str, size: int) -> None:
        self._fetcher, self._url, self._size, self._position = fetcher, url, size, 0
        self._whole: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._size)
        if start >= stop:
            return 0
        if self._whole is None:
            content = self._fetcher.read(self._url, start, stop)
            if len(content) > stop - start:
                self._whole = content
        if self._whole is not None:
            content = self._whole[start:stop]
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
