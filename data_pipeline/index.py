"""The index of a split as everyone sees it: what is where in its shards, and reading members, from files or URLs.

How it lies on disk is in index_files.py, how URLs are read in remote_shards.py, in which order in order.py.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.fetch import Fetcher, Gone, Missing, RemoteSettings
from data_pipeline.index_files import (
    AGAIN,
    FORMAT_VERSION,
    MEMBER_DTYPE,
    Segments,
    load_files,
    member_hash,
    write_index,
)
from data_pipeline.places import Place, is_url, join
from data_pipeline.remote_shards import Block, RemoteShards
from data_pipeline.seen import Seen
from sisa_dist.config import UserError

_CACHE_BYTES = 64 << 20  # of ids; about two members a lane are in use at a time, of 2 MB at 1 048 576 ids of uint16

__all__ = ["FORMAT_VERSION", "MEMBER_DTYPE", "Index", "member_hash", "write_index"]


@dataclass
class Index:
    """One split. Member m holds `tokens[m]` ids of `dtype`, documents ended by `eos_id`."""

    folder: str
    dtype: np.dtype[Any]
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    documents: int
    shards: list[dict[str, Any]]  # name, bytes
    members: NDArray[Any]  # MEMBER_DTYPE [members]
    token_counts: NDArray[np.int64]  # [vocab_size], over the whole split
    _segments: Segments
    _fetcher: Fetcher
    foreign: bool = False  # shards that others wrote: nothing is known of what stands beside the ids
    remote: RemoteShards | None = None  # None: every shard is a local file
    cache_bytes: int = _CACHE_BYTES
    _cache: OrderedDict[int, NDArray[Any]] = field(default_factory=OrderedDict, repr=False)
    _cached: int = 0  # bytes
    _reading: dict[int, threading.Lock] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # the loader reads in its own threads

    @classmethod
    def load(
        cls,
        folder: Place,
        *,
        remote: RemoteSettings | None = None,
        check_shards: bool = True,
        absent_ok: bool = False,
    ) -> Index:
        """The index in `folder`, a path or URL. `remote`: how URLs are read.

        Raises UserError where it or, with `check_shards`, a local shard is absent or damaged; `absent_ok`: an absent
        shard is for `read_member` to tell.
        """
        fetcher = Fetcher(remote or RemoteSettings())
        raw, arrays, segments = load_files(folder, fetcher)
        names = ("vocab_size", "eos_id", "tokenizer_sha256", "documents", "shards")
        index = cls(
            folder=str(folder),
            dtype=np.dtype(raw["dtype"]),
            **{name: raw[name] for name in names},
            members=arrays["members.npy"],
            token_counts=arrays["token_counts.npy"],
            _segments=segments,
            _fetcher=fetcher,
            foreign="foreign" in raw,
        )
        if check_shards:
            index._check_shards(absent_ok)
        if any(is_url(path) for path in index.shard_paths):
            index.remote = RemoteShards(
                fetcher,
                hash=lambda payload: member_hash(payload).hex(),
                beside=index._blocks_of,
                total_bytes=sum(shard["bytes"] for shard in index.shards),
            )
        return index

    @cached_property
    def shard_paths(self) -> list[str]:
        """Where each shard is: a file or URL."""
        return [join(self.folder, shard["name"]) for shard in self.shards]

    @cached_property
    def _seen(self) -> Seen:
        return Seen(len(self.members))

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Ids of each member, [members]."""
        return self.members["tokens"].astype(np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def fingerprint(self) -> str:
        """Of every token and its place: format, tokenizer, member lengths and content hashes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{FORMAT_VERSION} {self.dtype.str} {self.eos_id} {self.tokenizer_sha256}\n".encode())
        digest.update(np.ascontiguousarray(self.members["tokens"]).tobytes())
        digest.update(np.ascontiguousarray(self.members["hash"]).tobytes())
        return digest.hexdigest()

    def shard_digests(self) -> dict[str, str]:
        """4 bytes of blake2b over each shard's member hashes, in hex, by its name."""
        digests = {}
        for number, shard in enumerate(self.shards):
            content = np.ascontiguousarray(self.members["hash"][self.members["shard"] == number])
            digests[shard["name"]] = hashlib.blake2b(content.tobytes(), digest_size=4).hexdigest()
        return digests

    def segments(self, member: int) -> NDArray[np.int64]:
        """Tokens of each document part in the member, in order; they sum to its tokens."""
        start = int(self.members["segments_end"][member - 1]) if member else 0
        found = self._segments.rows(start, int(self.members["segments_end"][member]))
        if found.sum() != self.members["tokens"][member]:
            raise UserError(f"{self.folder}/segments.npy: wrong at member {member}, it is damaged: {AGAIN}")
        return found

    def all_segments(self, start: int, stop: int) -> NDArray[np.int64]:
        """Lengths start … stop-1 of the document parts of the whole split, over the ends of members."""
        return self._segments.rows(start, stop)

    def ask(self, members: Iterable[int]) -> None:
        """Has the members that lie at URLs fetched in the background, in this order, for `read_member` to find."""
        if self.remote is not None:
            # In the lock: what is fetched after its reader has been served would lie in memory till the next epoch.
            with self._lock:
                wanted = [member for member in members if member not in self._cache and member not in self._reading]
                self.remote.ask([block for member in wanted if is_url((block := self.block(member)).url)])

    def shard_name(self, member: int) -> str:
        """The shard that holds the member, as the index calls it."""
        return str(self.shards[int(self.members["shard"][member])]["name"])

    def check_folder(self) -> None:
        """Raises UserError where the index is gone too: then it is no single shard that is missing."""
        path = join(self.folder, "index.json")
        try:
            there = bool(self._fetcher.read(path, 0, 1)) if is_url(path) else os.path.isfile(path)
        except Gone:
            there = False
        if not there:
            raise UserError(f"{path}: gone as well, so it is not one shard that is missing: {AGAIN}")

    def read_member(self, member: int) -> NDArray[Any]:
        """The ids of one member, checked against its hash. Raises UserError where they are not what was written,
        Missing where there is no such shard.

        Threads that want the same member read it once.
        """
        with self._lock:
            if member in self._cache:
                self._cache.move_to_end(member)
                return self._cache[member]
            mine = self._reading.setdefault(member, threading.Lock())
        with mine:
            with self._lock:
                if member in self._cache:  # another thread was at it
                    return self._cache[member]
            try:
                found = self._read_member(member)
                with self._lock:
                    self._cache[member] = found
                    self._cached += found.nbytes
                    while self._cached > self.cache_bytes and len(self._cache) > 1:
                        self._cached -= self._cache.popitem(last=False)[1].nbytes
            finally:
                with self._lock:
                    self._reading.pop(member, None)
            return found

    def _read_member(self, member: int) -> NDArray[Any]:
        block = self.block(member)
        if is_url(block.url):
            assert self.remote is not None
            payload = self.remote.read(block)
        else:
            try:
                file = os.open(block.url, os.O_RDONLY)
                try:
                    payload = os.pread(file, block.stop - block.start, block.start)
                finally:
                    os.close(file)
            except FileNotFoundError:
                raise Missing(f"{block.url}: the shard is missing: {AGAIN}") from None
            except OSError as error:
                raise UserError(f"{block.url}: cannot be read ({error.strerror}): {AGAIN}") from None
            if self._seen.same(member, payload):
                return np.frombuffer(payload, dtype=self.dtype)
            if member_hash(payload).hex() != block.key:
                raise UserError(
                    f"{block.url}: {block.name} is not what was written (cut short or changed, perhaps replaced since "
                    f"the index was read): {AGAIN}"
                )
        found = np.frombuffer(payload, dtype=self.dtype)
        if len(found) and found.max() >= self.vocab_size:
            raise UserError(
                f"{block.url}: {block.name} holds the id {found.max()} of a vocabulary of {self.vocab_size}: {AGAIN}"
            )
        self._seen.accept(member, payload)
        return found

    def block(self, member: int) -> Block:
        """Where the member lies, and its hash."""
        row = self.members[member]
        start = int(row["offset"])
        stop = start + int(row["tokens"]) * self.dtype.itemsize
        return Block(f"member {member}", self.shard_paths[int(row["shard"])], start, stop, row["hash"].tobytes().hex())

    def _blocks_of(self, url: str) -> list[Block]:
        return [self.block(int(m)) for m in np.flatnonzero(self.members["shard"] == self.shard_paths.index(url))]

    def _check_shards(self, absent_ok: bool) -> None:
        """Presence and size of every local shard; remote ones are found out when read, a request each is too dear."""
        for path, shard in zip(self.shard_paths, self.shards, strict=True):
            if is_url(path):
                continue
            if not os.path.isfile(path):
                if absent_ok:
                    continue
                raise Missing(f"{path}: the shard is missing: {AGAIN}")
            if (size := os.stat(path).st_size) != shard["bytes"]:
                raise UserError(f"{path}: {size} bytes instead of {shard['bytes']}, cut short or changed: {AGAIN}")
