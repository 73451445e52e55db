"""The index of a split: what is where in its shards, and reading members by range from a local file or any fsspec URL.

Beside the tars: index.json (a few lines and the shards' names), members.npy (a row a member), segments.npy (uint32, the
document lengths, memory-mapped where local) and token_counts.npy. It says nothing of order: see order.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from sisa_dist.config import UserError

FORMAT_VERSION = 2
# `offset` is of the first id inside the shard; `segments_end` counts rows of segments.npy up to and with this member.
MEMBER_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("tokens", "<u4"),
        ("offset", "<u8"),
        ("segments_end", "<u8"),
        ("continued", "u1"),
        ("hash", "V16"),
    ]
)
_FILES = ("members.npy", "token_counts.npy")  # small enough to be hashed whole whenever they are loaded
_CACHE_BYTES = 64 << 20  # of ids; about two members a lane are in use at a time, of 2 MB at 1 048 576 ids of uint16
_AGAIN = "restore it or run `sisa prepare --force`"


def member_hash(payload: bytes) -> bytes:
    """What the index stores of a member's content: 16 bytes of blake2b over its ids as they lie in the shard."""
    return hashlib.blake2b(payload, digest_size=16).digest()


def write_index(
    folder: Path,
    *,
    header: dict[str, Any],
    members: NDArray[Any],
    segments: NDArray[np.uint32],
    token_counts: NDArray[np.int64],
) -> None:
    """header: dtype, vocab_size, eos_id, tokenizer_sha256, documents, shards; see Index."""
    np.save(folder / "members.npy", members)
    np.save(folder / "segments.npy", segments)
    np.save(folder / "token_counts.npy", token_counts)
    hashes = {name: member_hash((folder / name).read_bytes()).hex() for name in _FILES}
    text = json.dumps({"format": FORMAT_VERSION} | header | {"hashes": hashes}, indent=1)
    (folder / "index.json").write_text(text, encoding="utf-8")


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
    _segments: NDArray[np.uint32]
    cache_bytes: int = _CACHE_BYTES
    _cache: OrderedDict[int, NDArray[Any]] = field(default_factory=OrderedDict, repr=False)
    _cached: int = 0  # bytes
    _reading: dict[int, threading.Lock] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # the loader reads in its own threads

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """The index in `folder`, a path or URL. Raises UserError where it or a local shard is absent or damaged."""
        path = f"{folder}/index.json"
        try:
            raw = json.loads(_read(path))
            if raw["format"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format {raw['format']}, this version reads {FORMAT_VERSION}: run `sisa prepare --force`"
                )
            arrays = {}
            for name in _FILES:
                content = _read(f"{folder}/{name}")
                if member_hash(content).hex() != raw["hashes"][name]:
                    raise UserError(f"{folder}/{name}: not what was written, it is damaged: {_AGAIN}")
                arrays[name] = np.load(io.BytesIO(content))
            names = ("vocab_size", "eos_id", "tokenizer_sha256", "documents", "shards")
            index = cls(
                folder=str(folder),
                dtype=np.dtype(raw["dtype"]),
                **{name: raw[name] for name in names},
                members=arrays["members.npy"],
                token_counts=arrays["token_counts.npy"],
                _segments=_load_segments(f"{folder}/segments.npy"),
            )
        except FileNotFoundError as error:
            raise UserError(f"{folder}: no index here ({error}): run `sisa prepare` first") from None
        except (OSError, ImportError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be read ({_line(error)}): {_AGAIN}") from None
        if len(index.members) and len(index._segments) != index.members["segments_end"][-1]:
            raise UserError(f"{folder}/segments.npy: another length than the index says, it is damaged: {_AGAIN}")
        index._check_shards()
        return index

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
        found = self._segments[start : int(self.members["segments_end"][member])].astype(np.int64)
        if found.sum() != self.members["tokens"][member]:
            raise UserError(f"{self.folder}/segments.npy: wrong at member {member}, it is damaged: {_AGAIN}")
        return found

    def read_member(self, member: int) -> NDArray[Any]:
        """The ids of one member, checked against its hash. Raises UserError where they are not what was written.

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
        row = self.members[member]
        path = f"{self.folder}/{self.shards[int(row['shard'])]['name']}"
        start = int(row["offset"])
        try:
            payload = _read(path, start, start + int(row["tokens"]) * self.dtype.itemsize)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({_line(error)}): {_AGAIN}") from None
        if member_hash(payload) != row["hash"].tobytes():
            raise UserError(f"{path}: member {member} is not what was written (cut short or changed): {_AGAIN}")
        return np.frombuffer(payload, dtype=self.dtype)

    def _check_shards(self) -> None:
        """Presence and size of every local shard; remote ones are found out when read, a request each is too dear."""
        if "://" in self.folder:
            return
        for shard in self.shards:
            path = Path(self.folder) / shard["name"]
            if not path.is_file():
                raise UserError(f"{path}: the shard is missing: {_AGAIN}")
            if (size := path.stat().st_size) != shard["bytes"]:
                raise UserError(f"{path}: {size} bytes instead of {shard['bytes']}, cut short or changed: {_AGAIN}")


def _read(path: str, start: int | None = None, stop: int | None = None) -> bytes:
    filesystem, inner = fsspec.core.url_to_fs(path)
    return filesystem.cat_file(inner, start=start, end=stop)


def _load_segments(path: str) -> NDArray[np.uint32]:
    try:
        return np.load(io.BytesIO(_read(path))) if "://" in path else np.load(path, mmap_mode="r")
    except ValueError as error:
        raise UserError(f"{path}: damaged or cut short ({_line(error)}): {_AGAIN}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
