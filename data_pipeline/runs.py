"""Runs: a slice's documents as token arrays in the order of their shuffle keys, so that a range of keys lies together.

This is the middle of an external sort. A slice holds at most `buffer_bytes` of ids before it writes them out, sorted;
so a slice is one or more runs one after the other in NAME.ids, with a row for each document in NAME.records. A
partition of the keys is read from every run in a few stretches, however large the corpus is.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# `offset` counts ids from the start of NAME.ids; `number` is the document's place among those of its slice; `bytes` are
# of its text.
RECORD = np.dtype([("key", "<u8"), ("offset", "<u8"), ("bytes", "<u8"), ("tokens", "<u4"), ("number", "<u4")])
FOUND = np.dtype([*RECORD.descr, ("slice", "<u4")])


def shuffle_key(seed: int, file: int, place: int) -> int:
    """64 bits, uniform, of a document: of where it stands and the seed, so that copies of a text end up far apart."""
    name = f"{file}/{place}".encode()
    return int.from_bytes(
        hashlib.blake2b(name, digest_size=8, key=seed.to_bytes(8, "little"), person=b"sisa shuffle").digest(), "little"
    )


def partition_of(keys: NDArray[np.uint64], partitions: int) -> NDArray[np.int64]:
    """Which of `partitions` < 2^32 equal ranges of keys each falls into."""
    return ((keys >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)


def partition_start(partition: int, partitions: int) -> int:
    """The smallest key of `partition`; 2^64 behind the last."""
    return -(-(partition << 32) // partitions) << 32


class RunWriter:
    """Takes a slice's documents and writes FOLDER/NAME.ids and .records, each whole when it appears."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], *, buffer_bytes: int) -> None:
        self._paths = [folder / f"{name}.{ending}" for ending in ("ids", "records")]
        self._partial = [path.with_name(f"{path.name}.partial-{os.getpid()}") for path in self._paths]
        self._dtype, self._buffer_bytes = dtype, buffer_bytes
        self._ids = open(self._partial[0], "wb")  # noqa: SIM115, closed by close
        self._records = open(self._partial[1], "wb")  # noqa: SIM115
        self._held: list[tuple[int, int, int, NDArray[Any]]] = []
        self._held_bytes = self._written = 0
        self.runs: list[int] = []  # documents of each

    def add(self, *, key: int, number: int, text_bytes: int, ids: NDArray[Any]) -> None:
        """`number` grows; `ids` are without the eos."""
        self._held.append((key, number, text_bytes, ids))
        self._held_bytes += ids.nbytes + 300  # and what Python adds
        if self._held_bytes > self._buffer_bytes:
            self._flush()

    def close(self) -> dict[str, int]:
        """The sizes of the files, by name."""
        self._flush()
        for file, partial, path in zip((self._ids, self._records), self._partial, self._paths, strict=True):
            file.close()
            os.replace(partial, path)
        return {path.name: path.stat().st_size for path in self._paths}

    def _flush(self) -> None:
        if not self._held:
            return
        self._held.sort(key=lambda item: item[:2])
        records = np.empty(len(self._held), RECORD)
        for row, (key, number, text_bytes, ids) in enumerate(self._held):
            records[row] = key, self._written, text_bytes, len(ids), number
            self._ids.write(ids.tobytes())
            self._written += len(ids)
        self._records.write(records.tobytes())
        self.runs.append(len(records))
        self._held, self._held_bytes = [], 0


@dataclass(frozen=True)
class Run:
    """The runs of one slice: `paths` of .ids and .records without their ending, and the documents of each run."""

    path: Path
    runs: Sequence[int]

    def records(self) -> NDArray[Any]:
        if not sum(self.runs):
            return np.empty(0, RECORD)
        return np.memmap(self.path.with_name(self.path.name + ".records"), RECORD, mode="r")

    def between(self, low: int, high: int) -> NDArray[Any]:
        """The records of RECORD with low ≤ key < high. Reads little more than those."""
        records, found, start = self.records(), [], 0
        for number in self.runs:
            rows = range(start, start + number)
            first, last = (
                start + bisect.bisect_left(rows, key, key=lambda row: int(records["key"][row])) for key in (low, high)
            )
            found.append(np.array(records[first:last]))
            start += number
        return np.concatenate(found) if found else np.empty(0, RECORD)


def read_documents(
    slices: Sequence[Run],
    low: int,
    high: int,
    *,
    dtype: np.dtype[Any],
    dropped: Sequence[Path | None],
    group_bytes: int,
) -> Iterator[NDArray[Any]]:
    """The ids of every document with low ≤ key < high in the order of (key, slice, number).

    Holds 40 bytes a document of the range and about `group_bytes` of ids, or one longer document. `dropped`: a file
    for a slice with a byte a document of it, in order of its number, 1 where the document was taken out.
    """
    parts = []
    for number, (run, mask) in enumerate(zip(slices, dropped, strict=True)):
        rows = kept(run.between(low, high), mask)
        part = np.empty(len(rows), FOUND)
        for name in RECORD.names or ():
            part[name] = rows[name]
        part["slice"] = number
        parts.append(part)
    found = np.concatenate(parts) if parts else np.empty(0, FOUND)
    found = found[np.lexsort((found["number"], found["slice"], found["key"]))]
    groups = np.cumsum(found["tokens"].astype(np.int64)) * dtype.itemsize // max(1, group_bytes)
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(found)]
    for first, last in pairwise(edges):
        yield from _read_group(slices, found[first:last], dtype)


def kept(records: NDArray[Any], dropped: Path | None) -> NDArray[Any]:
    """Those of `records` that no pass took out; see read_documents."""
    if dropped is None or not len(records):
        return records
    return records[np.memmap(dropped, np.uint8, mode="r")[records["number"]] == 0]


def _read_group(slices: Sequence[Run], group: NDArray[Any], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    documents: list[NDArray[Any]] = [np.empty(0, dtype)] * len(group)
    order = np.lexsort((group["offset"], group["slice"]))
    ends = group["offset"] + group["tokens"]
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and group["slice"][order[stop]] == group["slice"][order[start]]
            and group["offset"][order[stop]] == ends[order[stop - 1]]
        ):
            stop += 1
        rows = order[start:stop]
        path, offset = slices[int(group["slice"][rows[0]])].path, int(group["offset"][rows[0]])
        count = int(ends[rows[-1]]) - offset
        stretch = np.fromfile(path.with_name(path.name + ".ids"), dtype, count=count, offset=offset * dtype.itemsize)
        if len(stretch) != count:
            raise OSError(f"{path}.ids: shorter than it was")
        for row in rows:
            begin = int(group["offset"][row]) - offset
            documents[row] = stretch[begin : begin + int(group["tokens"][row])]
        start = stop
    yield from documents
