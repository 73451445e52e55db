"""Writes one split's token stream as ordinary WebDataset tars, whose bytes depend on the tokens alone, and its index.

A member is up to `member_tokens` consecutive tokens of the split, documents joined by the eos that ends each:
    000000000012.json   {"dtype", "tokens", "segments": [tokens of each document part in it], "continued": whether the
                        first of them began in the member before}
    000000000012.bin    the ids, little-endian uint16 (uint32 for vocabularies above 65 536)
`np.frombuffer(sample["bin"], "<u2")` reads a sample of the plain webdataset library. The index (index.py) repeats what
the loader needs, with the place and hash of every member.
"""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import MEMBER_DTYPE, member_hash, write_index

_TAR_BLOCK = 512


@dataclass(frozen=True)
class Part:
    """What an index says of some consecutive shards; `segments_end` counts from the first of `segments`."""

    documents: int
    shards: list[dict[str, Any]]  # name, bytes
    members: NDArray[Any]  # of MEMBER_DTYPE
    segments: NDArray[np.uint32]
    token_counts: NDArray[np.int64]  # [vocab_size]


class ShardWriter:
    """Takes documents one by one and writes tars and index into `folder`, which it makes.

    The folder is whole only after `close`: whoever writes it builds it elsewhere and renames. Several writers, each
    with its own `first_member` and `first_shard`, can share a folder: they `finish`, and joining.py writes the index.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: np.dtype[Any],
        vocab_size: int,
        eos_id: int,
        tokenizer_sha256: str,
        member_tokens: int,
        shard_members: int,
        first_member: int = 0,
        first_shard: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.documents = 0
        self._folder = folder
        self._dtype = dtype
        self._header = {
            "dtype": dtype.str,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "tokenizer_sha256": tokenizer_sha256,
        }
        self._eos_id = eos_id
        self._member_tokens = member_tokens
        self._shard_members = shard_members
        self._first_member, self._first_shard = first_member, first_shard
        self._shards: list[dict[str, Any]] = []
        self._rows: list[tuple[Any, ...]] = []  # of MEMBER_DTYPE
        self._all_segments = array("I")
        self._counts = np.zeros(vocab_size, np.int64)
        self._buffer = np.empty(member_tokens, dtype)  # the member being filled
        self._filled = 0
        self._segments: list[int] = []
        self._continued = False
        self._tar: tarfile.TarFile | None = None

    def add(self, ids: Sequence[int] | NDArray[Any]) -> None:
        """One document's ids, without the eos that this appends."""
        tokens = np.empty(len(ids) + 1, self._dtype)
        tokens[:-1] = ids
        tokens[-1] = self._eos_id
        self.documents += 1
        position = 0
        while position < len(tokens):
            if self._filled == self._member_tokens:
                self._flush(next_continued=position > 0)
            take = min(len(tokens) - position, self._member_tokens - self._filled)
            self._buffer[self._filled : self._filled + take] = tokens[position : position + take]
            self._filled += take
            self._segments.append(take)
            position += take

    def close(self) -> int:
        """Writes the last member and the index; returns the tokens of the split."""
        part = self.finish()
        write_index(
            self._folder,
            header=self._header | {"documents": part.documents, "shards": part.shards},
            members=part.members,
            segments=part.segments,
            token_counts=part.token_counts,
        )
        return int(part.token_counts.sum())

    def finish(self) -> Part:
        """Writes the last member; no index, which is for whoever puts the parts together."""
        if self._filled:
            self._flush(next_continued=False)
        self._close_tar()
        members = np.array(self._rows, dtype=MEMBER_DTYPE)
        segments = np.array(self._all_segments, dtype="<u4")
        return Part(self.documents, self._shards, members, segments, self._counts)

    def _flush(self, *, next_continued: bool) -> None:
        if len(self._rows) % self._shard_members == 0:
            self._close_tar()
            self._shards.append({"name": f"{self._first_shard + len(self._shards):06d}.tar", "bytes": 0})
            path = self._folder / self._shards[-1]["name"]
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115, closed with its last member
        number = self._first_member + len(self._rows)
        tokens = self._buffer[: self._filled]
        payload = tokens.tobytes()
        notes = {
            "dtype": self._dtype.str,
            "tokens": self._filled,
            "segments": self._segments,
            "continued": self._continued,
        }
        self._add_file(f"{number:012d}.json", json.dumps(notes).encode())
        offset = self._add_file(f"{number:012d}.bin", payload)
        self._all_segments.extend(self._segments)
        shard, end, digest = (
            self._first_shard + len(self._shards) - 1,
            len(self._all_segments),
            np.void(member_hash(payload)),
        )
        self._rows.append((shard, self._filled, offset, end, self._continued, digest))
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        self._filled, self._segments, self._continued = 0, [], next_continued

    def _add_file(self, name: str, content: bytes) -> int:
        """Adds a file that says nothing of when, where and by whom it was made; returns where its content starts."""
        assert self._tar is not None
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        offset = self._tar.fileobj.tell() + _TAR_BLOCK  # type: ignore[union-attr]
        self._tar.addfile(entry, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header
        return offset

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._shards[-1]["bytes"] = (self._folder / self._shards[-1]["name"]).stat().st_size
            self._tar = None
