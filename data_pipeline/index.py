"""The index of a split, and reading its members by range: from a local file, or any URL fsspec knows."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from data_pipeline.shards import FORMAT_VERSION, member_hash
from sisa_dist.config import UserError

_COLUMNS = ("shard", "offset", "tokens", "hash", "segments", "continued")
_CACHED_MEMBERS = 64  # 2 MB at 16 384 tokens of uint16; a few a lane are in use at a time


@dataclass
class Index:
    """What is where in the shards of one split. Member m holds `tokens[m]` ids; see data_pipeline.shards."""

    folder: str
    dtype: np.dtype
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    documents: int
    shards: list[dict[str, Any]]
    shard: list[int]
    offset: list[int]
    tokens: np.ndarray  # int64 [members]
    hash: list[str]
    segments: list[list[int]]
    continued: list[int]
    _cache: OrderedDict[int, np.ndarray] = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read `folder`/index.json. Raises UserError where it is absent, damaged or of another format."""
        path = f"{folder}/index.json"
        again = "run `sisa prepare` again"
        try:
            with fsspec.open(path, "rb") as file:
                raw = json.loads(file.read())
            if raw["format"] != FORMAT_VERSION:
                raise UserError(f"{path}: format {raw['format']}, this version reads {FORMAT_VERSION}: {again}")
            columns = {name: raw[name] for name in _COLUMNS}
            if len({len(column) for column in columns.values()}) != 1:
                raise UserError(f"{path}: its columns differ in length, it is damaged: {again}")
            columns["tokens"] = np.array(raw["tokens"], dtype=np.int64)
            names = ("vocab_size", "eos_id", "tokenizer_sha256", "documents", "shards")
            index = cls(
                folder=str(folder), dtype=np.dtype(raw["dtype"]), **{name: raw[name] for name in names}, **columns
            )
        except FileNotFoundError:
            raise UserError(f"{path}: no index here: run `sisa prepare` first") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be read, it is damaged ({error}): {again}") from None
        index._check_sizes()
        return index

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def fingerprint(self) -> str:
        """Of every token and its place: tokenizer, member lengths and hashes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{FORMAT_VERSION} {self.dtype.str} {self.tokenizer_sha256}\n".encode())
        for tokens, member in zip(self.tokens.tolist(), self.hash, strict=True):
            digest.update(f"{tokens} {member}\n".encode())
        return digest.hexdigest()

    def read_member(self, member: int) -> np.ndarray:
        """The ids of one member, checked against its hash. Raises UserError where they are not what was written."""
        if member in self._cache:
            self._cache.move_to_end(member)
            return self._cache[member]
        path = f"{self.folder}/{self.shards[self.shard[member]]['name']}"
        size = int(self.tokens[member]) * self.dtype.itemsize
        try:
            with fsspec.open(path, "rb") as file:
                file.seek(self.offset[member])
                payload = file.read(size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}): restore it or run `sisa prepare --force`") from None
        if member_hash(payload) != self.hash[member]:
            raise UserError(
                f"{path}: member {member} is not what was written (cut short or changed): restore the file or run "
                "`sisa prepare --force`"
            )
        self._cache[member] = np.frombuffer(payload, dtype=self.dtype)
        if len(self._cache) > _CACHED_MEMBERS:
            self._cache.popitem(last=False)
        return self._cache[member]

    def _check_sizes(self) -> None:
        for shard in self.shards:
            path = f"{self.folder}/{shard['name']}"
            try:
                size = fsspec.core.url_to_fs(path)[0].size(path)
            except OSError:
                raise UserError(f"{path}: the shard is missing: restore it or run `sisa prepare --force`") from None
            if size is not None and size != shard["bytes"]:
                raise UserError(
                    f"{path}: {size} bytes instead of {shard['bytes']}, cut short or changed: restore the file or run "
                    "`sisa prepare --force`"
                )
