"""The files of an index, written and read: each is covered by hashes, so that what is damaged is never taken for data.

Beside the tars: index.json (a few lines and the shards' names), members.npy (a row a member), segments.npy (uint32, the
document lengths, memory-mapped where local) and token_counts.npy. Their meaning for a reader is Index's.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.fetch import Fetcher, Gone
from data_pipeline.places import Place, is_url, join
from sisa_dist.config import UserError

FORMAT_VERSION = 3  # 2 had no hash of index.json and of segments.npy
DTYPES = ("<u2", "<u4", "<u8")  # of ids; the last in foreign shards alone
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
AGAIN = "restore it or run `sisa prepare --force`"


class NoIndex(UserError):
    """The folder holds no index at all."""


_FILES = ("members.npy", "token_counts.npy")  # small enough to be hashed whole whenever they are loaded
_CHUNK = 1 << 16  # rows of segments.npy under one hash, 256 KB: hashed when first touched


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
    hashes: dict[str, Any] = {name: member_hash((folder / name).read_bytes()).hex() for name in _FILES}
    hashes["segments.npy"] = [_chunk_hash(segments[at : at + _CHUNK]) for at in range(0, len(segments), _CHUNK)]
    raw = {"format": FORMAT_VERSION} | header | {"hashes": hashes}
    (folder / "index.json").write_text(json.dumps(raw | {"hash": _header_hash(raw)}, indent=1), encoding="utf-8")


def load_files(folder: Place, fetcher: Fetcher) -> tuple[dict[str, Any], dict[str, NDArray[Any]], Segments]:
    """index.json, the arrays in `folder` by file name, and the document lengths. Raises UserError, see Index.load."""
    path = join(folder, "index.json")
    try:
        content = read_file(path, fetcher)
    except (FileNotFoundError, NotADirectoryError, Gone) as error:
        raise NoIndex(f"{folder}: no index here ({_line(error)}): run `sisa prepare` first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}): {AGAIN}") from None
    try:
        raw = _header(path, content)
        arrays = {}
        for name in _FILES:
            content = read_file(join(folder, name), fetcher)
            if member_hash(content).hex() != raw["hashes"][name]:
                raise UserError(f"{folder}/{name}: not what was written, it is damaged: {AGAIN}")
            arrays[name] = np.load(io.BytesIO(content))
        members = arrays["members.npy"]
        rows = int(members["segments_end"][-1]) if len(members) else 0
        segments = Segments(_load_segments(join(folder, "segments.npy"), rows, fetcher), raw, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror or _line(error)}): {AGAIN}"
        ) from None
    return raw, arrays, segments


def read_file(path: str, fetcher: Fetcher) -> bytes:
    """A whole file at a path or URL. Raises OSError for a path, UserError for a URL."""
    return fetcher.read(path) if is_url(path) else Path(path).read_bytes()


class Segments:
    """The document lengths of a split, whose chunks are checked when they are first looked at."""

    def __init__(self, lengths: NDArray[np.uint32], raw: dict[str, Any], folder: Place) -> None:
        self._lengths, self._hashes, self._folder = lengths, raw["hashes"]["segments.npy"], folder
        self._checked = np.zeros(len(self._hashes), dtype=bool)

    def __len__(self) -> int:
        return len(self._lengths)

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Lengths start … stop-1. Raises UserError where they are not what was written."""
        for chunk in range(start // _CHUNK, -(-stop // _CHUNK)):
            if not self._checked[chunk]:
                if _chunk_hash(self._lengths[chunk * _CHUNK : (chunk + 1) * _CHUNK]) != self._hashes[chunk]:
                    raise UserError(f"{self._folder}/segments.npy: not what was written, it is damaged: {AGAIN}")
                self._checked[chunk] = True
        return self._lengths[start:stop].astype(np.int64)


def _header(path: str, content: bytes) -> dict[str, Any]:
    """index.json, of this format and as it was written."""
    try:
        raw = json.loads(content)
        if raw["format"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: format {raw['format']}, this version reads {FORMAT_VERSION}: run `sisa prepare --force`"
            )
        written = raw.pop("hash")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({_line(error)}): {AGAIN}") from None
    if written != _header_hash(raw):
        raise UserError(f"{path}: not what was written, it is damaged: {AGAIN}")
    if raw["dtype"] not in DTYPES:
        raise UserError(f"{path}: ids of {raw['dtype']!r}, not one of {', '.join(DTYPES)}: {AGAIN}")
    return raw


def _load_segments(path: str, rows: int, fetcher: Fetcher) -> NDArray[np.uint32]:
    try:
        found = np.load(io.BytesIO(fetcher.read(path))) if is_url(path) else np.load(path, mmap_mode="r")
    except (OSError, UserError):
        raise
    except Exception as error:  # NumPy's reader of garbage raises whatever the parsers below it do
        raise UserError(f"{path}: damaged or cut short ({_line(error)}): {AGAIN}") from None
    if not isinstance(found, np.ndarray) or found.dtype != "<u4" or found.shape != (rows,):
        raise UserError(f"{path}: not {rows} lengths of uint32 as the index says, it is damaged: {AGAIN}")
    return found


def _header_hash(raw: dict[str, Any]) -> str:
    return member_hash(json.dumps(raw, sort_keys=True).encode()).hex()


def _chunk_hash(lengths: NDArray[np.uint32]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(lengths, dtype="<u4").tobytes(), digest_size=8).hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
