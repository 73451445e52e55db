"""`sisa data reindex FOLDER`: the index of our own shards again, out of what the tars say of themselves.

Every member's .json says what the index said, so the files come back byte for byte. A new index takes the shards for
what they are now: it would call damaged ids right. So what is left of the old one is held against it, the documents
must end where the ids have an eos, and no member may be missing in the middle; where nothing is left to compare with,
that is said.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from data_pipeline.building import locked
from data_pipeline.index import MEMBER_DTYPE, Index, member_hash
from data_pipeline.index_files import NoIndex
from data_pipeline.index_writer import IndexWriter
from data_pipeline.inputs import one_line
from data_pipeline.manifest import read_manifest
from data_pipeline.merge import MADE_BY as MERGED
from data_pipeline.prepared import SPLITS
from data_pipeline.progress import Meter
from data_pipeline.shards import Part
from data_pipeline.tars import Tar
from data_pipeline.tokenizer import Tokenizer, token_dtype
from sisa_dist.config import UserError

_AGAIN = "restore it or run `sisa prepare --force`"
_FILES = ("members.npy", "segments.npy", "token_counts.npy", "index.json")  # the last makes the others count
_HEADER_BYTES = 64 << 20


def rebuild(folder: Path, *, quiet: bool = False) -> list[str]:
    """Writes the index of each split of `folder` that has shards and no whole index; returns the splits' names.

    Raises UserError where a shard is damaged or missing, or is not what is left of the old index says.
    """
    console = Console(quiet=quiet, highlight=False)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name one that `sisa prepare` made, or shards to index")
    made, tokenizer = read_manifest(folder), Tokenizer.load(folder)
    written, merged = [], (made or {}).get("made_by") == MERGED
    for name in SPLITS:
        split = folder / name
        shards = sorted(split.glob("[0-9]*.tar"))
        if not shards:
            if split.is_dir():
                raise UserError(f"{split}: holds no shards of its own: name those it is of, and another folder to make")
            continue
        with locked(folder / f"{name}.lock", f"{split}: another process is at it: wait until it is done"):
            if why := _damage(split):
                console.print(f"{split}: {why}", soft_wrap=True, markup=False)
                _rebuild_split(split, shards, tokenizer, (made or {}).get("counts", {}).get(name), console, merged)
                written.append(name)
            else:
                console.print(f"{split}: its index is whole; `sisa data verify` checks the shards", soft_wrap=True)
    if not written and not any((folder / name).is_dir() for name in SPLITS):
        raise UserError(f"{folder}: no shards here, in {' or '.join(SPLITS)}: name the shards to index")
    return written


def _damage(split: Path) -> str | None:
    try:
        index = Index.load(split, check_shards=False)
        rows = int(index.members["segments_end"][-1]) if len(index.members) else 0
        index.all_segments(0, rows)
    except NoIndex:
        return "has no index.json"
    except UserError as error:
        return str(error)
    return None


def _rebuild_split(
    split: Path,
    shards: list[Path],
    tokenizer: Tokenizer,
    counts: dict[str, int] | None,
    console: Console,
    merged: bool,
) -> None:
    work = split / ".reindex"
    if work.exists():  # of a process that was killed
        shutil.rmtree(work)
    old, checked = _old_members(split), 0
    writer = IndexWriter(work, split / ".segments", vocab_size=tokenizer.vocab_size)
    try:
        with Meter(console, f"indexing {split.name}", total=sum(path.stat().st_size for path in shards)) as meter:
            number = 0
            for position, path in enumerate(shards):
                if path.name != f"{position:06d}.tar":
                    raise UserError(f"{split}/{position:06d}.tar: the shard is missing: {_AGAIN}")
                part, number = _read_shard(path, number, tokenizer, merged=merged)
                if old is not None:
                    _compare(path, part, old[checked : checked + len(part.members)], checked)
                checked += len(part.members)
                writer.add(part)
                meter.add(path.stat().st_size)
        if old is not None and checked != len(old):
            raise UserError(
                f"{split}: holds {checked} members and members.npy {len(old)}: shards are missing: {_AGAIN}"
            )
        found = {"documents": writer.documents, "tokens": writer.tokens}
        if counts is not None and any(counts.get(key) != number for key, number in found.items()):
            raise UserError(
                f"{split}: holds {writer.documents:,} documents, {writer.tokens:,} tokens and prepared.json says "
                f"{counts.get('documents', 0):,}, {counts.get('tokens', 0):,}: shards are missing or changed: {_AGAIN}"
            )
        header = {"dtype": token_dtype(tokenizer.vocab_size).str, "vocab_size": tokenizer.vocab_size}
        writer.close(header | {"eos_id": tokenizer.eos_id, "tokenizer_sha256": tokenizer.sha256})
        for name in _FILES:
            os.replace(work / name, split / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        (split / ".segments").unlink(missing_ok=True)
    held = "all as the old members.npy says" if old is not None else "no old hashes were left to hold them against"
    console.print(f"{split}: index written, {checked:,} members, {writer.tokens:,} tokens; {held}", soft_wrap=True)


def _old_members(split: Path) -> NDArray[Any] | None:
    """members.npy, where it still has rows of the kind; its own hash was in index.json."""
    try:
        content = (split / "members.npy").read_bytes()
        found = np.load(io.BytesIO(content))
    except OSError:
        return None
    except Exception:  # NumPy's reader of garbage raises whatever the parsers below it do
        return None
    return found if isinstance(found, np.ndarray) and found.dtype == MEMBER_DTYPE and found.ndim == 1 else None


def _compare(path: Path, part: Part, old: NDArray[Any], first: int) -> None:
    rows = min(len(old), len(part.members))
    same = old[:rows]["hash"] == part.members[:rows]["hash"]
    if not same.all():
        member = first + int(np.flatnonzero(~same)[0])
        raise UserError(
            f"{path}: member {member} is not what members.npy says, one of the two is damaged: {_AGAIN}, or remove "
            f"members.npy if you know the shard to be whole"
        )


def _read_shard(path: Path, number: int, tokenizer: Tokenizer, *, merged: bool) -> tuple[Part, int]:
    """What the tar holds, and the number its next member would have."""
    dtype = token_dtype(tokenizer.vocab_size)
    rows: list[tuple[Any, ...]] = []
    segments: list[NDArray[np.uint32]] = []
    counts, segments_end, documents = np.zeros(tokenizer.vocab_size, np.int64), 0, 0
    try:
        with open(path, "rb") as raw:
            for stem, notes, offset, payload in _pairs(raw, path):
                if stem != f"{number:012d}":
                    if not (merged and stem == f"{0:012d}"):
                        raise UserError(f"{path}: {stem} where member {number} should be: shards are missing: {_AGAIN}")
                    number = 0
                ids = np.frombuffer(payload, dtype) if len(payload) % dtype.itemsize == 0 else np.empty(0, dtype)
                lengths = np.asarray(notes["segments"], np.uint32)
                fault = _fault(ids, notes, lengths, dtype, tokenizer)
                if fault:
                    raise UserError(f"{path}: {stem}: {fault}: {_AGAIN}")
                segments_end += len(lengths)
                continued = bool(notes["continued"])
                rows.append((0, len(ids), offset, segments_end, continued, np.void(member_hash(payload))))
                segments.append(lengths)
                counts += np.bincount(ids.astype(np.int64), minlength=tokenizer.vocab_size)
                documents += len(lengths) - continued
                number += 1
    except UserError:
        raise
    except tarfile.TarError as error:
        raise UserError(f"{path}: damaged or cut short ({one_line(error)}): {_AGAIN}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path}: no shard that `sisa prepare` wrote, or damaged: {_AGAIN}") from None
    shard = {"name": path.name, "bytes": path.stat().st_size}
    joined = np.concatenate(segments) if segments else np.empty(0, np.uint32)
    return Part(documents, [shard], np.array(rows, MEMBER_DTYPE), joined, counts), number


def _pairs(raw: IO[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any], int, bytes]]:
    """(number as it is named, what its .json says, where the ids begin, the ids) of each member."""
    tar, notes, before = Tar(raw), b"", ""
    for entry in tar:
        stem, _, extension = entry.name.rpartition(".")
        raw.seek(entry.offset_data)
        if extension == "json" and entry.isreg():
            before, notes = stem, raw.read(min(entry.size, _HEADER_BYTES))
        elif extension == "bin" and entry.isreg() and stem == before:
            payload = raw.read(entry.size)
            if len(payload) < entry.size:
                raise tarfile.ReadError("unexpected end of data")
            yield stem, json.loads(notes), entry.offset_data, payload
        else:
            raise UserError(f"{path}: {entry.name!r}: no member that `sisa prepare` wrote: {_AGAIN}")
    tar.check_end()


def _fault(
    ids: NDArray[Any], notes: dict[str, Any], lengths: NDArray[np.uint32], dtype: np.dtype[Any], tokenizer: Tokenizer
) -> str | None:
    if not len(ids) or (notes["dtype"], notes["tokens"]) != (dtype.str, len(ids)):
        return f"its .json says {notes['tokens']} ids of {notes['dtype']}, which is not what stands there"
    if ids.max() >= tokenizer.vocab_size:
        return f"holds the id {ids.max()} of a vocabulary of {tokenizer.vocab_size}"
    if not np.array_equal(np.union1d(np.flatnonzero(ids == tokenizer.eos_id) + 1, [len(ids)]), np.cumsum(lengths)):
        return "its documents do not end where its .json says"
    return None
