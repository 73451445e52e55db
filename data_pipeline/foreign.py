"""One WebDataset tar of token ids that others wrote, read once into rows of an index that serve it as it is.

A member of our index is a range of bytes that holds ids of one fixed width, so a sample can serve where it lies if its
ids lie like that: .npy (one axis, or all others of length 1; little-endian int or uint of 16, 32 or 64 bits), .u16 and
.u32, and .bin of a width that is told. Ids written as JSON or packed (.npz, .gz) are no such range: they have to be
written anew. A sample longer than a piece becomes several members, so that reading one is never much.
"""

from __future__ import annotations

import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import MEMBER_DTYPE, member_hash
from data_pipeline.inputs import one_line
from data_pipeline.readers import BadDocument
from data_pipeline.shards import Part
from data_pipeline.slices import OnBad
from data_pipeline.tars import Tar, leads_out
from sisa_dist.config import UserError

Boundaries = Literal["eos", "sample"]
WIDTHS = ("uint16", "uint32", "uint64")
PIECE_TOKENS = 1 << 20
_KINDS = ("npy", "u16", "u32", "bin")
_NPY_HEAD = 10_000  # bytes within which a header ends
_LEAVE_OUT = "write the sample again, or leave it out by --on-bad skip"
_EXAMPLES = 3


@dataclass(frozen=True)
class Reading:
    """How samples are read. `key`: the extension that holds the ids, where a sample has several; `width`: of a .bin."""

    vocab_size: int
    eos_id: int
    key: str | None = None
    width: str | None = None
    boundaries: Boundaries = "eos"
    on_bad: OnBad = "stop"
    piece_tokens: int = PIECE_TOKENS


@dataclass
class Found:
    """What a tar holds; `dtype` None: not one sample. skipped: by reason."""

    part: Part
    dtype: np.dtype[Any] | None
    eos: int
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


class _Ids(NamedTuple):
    dtype: np.dtype[Any]
    start: int  # byte of the tar
    number: int


def index_tar(path: Path, reading: Reading) -> Found:
    """Raises UserError, one line, for what cannot serve; with on_bad skip it is counted, and the rest is read.

    A document ends at every eos. A sample goes on with the document of the one before it in the tar where that did not
    end with eos, or (boundaries sample) never.
    """
    return _Reader(path, reading).read()


class _Reader:
    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.found = Found(
            Part(0, [], np.empty(0, MEMBER_DTYPE), np.empty(0, np.uint32), np.zeros(reading.vocab_size, np.int64)),
            None,
            0,
        )
        self.rows: list[tuple[Any, ...]] = []
        self.segments: list[NDArray[np.uint32]] = []
        self.segments_end = self.documents = 0

    def read(self) -> Found:
        try:
            with open(self.path, "rb") as raw:
                size = raw.seek(0, 2)
                raw.seek(0)
                self._walk(raw)
        except tarfile.TarError as error:
            self._bad("damaged tar", f"damaged or cut short ({one_line(error)}): fetch it again, or leave it out")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or one_line(error)}): mend it") from None
        members = np.array(self.rows, MEMBER_DTYPE)
        segments = np.concatenate(self.segments) if self.segments else np.empty(0, np.uint32)
        shard = {"name": str(self.path.resolve()), "bytes": size}
        self.found.part = Part(self.documents, [shard], members, segments, self.found.part.token_counts)
        return self.found

    def _walk(self, raw: IO[bytes]) -> None:
        tar, seen, goes_on = Tar(raw), set[int](), False
        chosen: tuple[str, str] | None = None  # sample and its field
        for entry in tar:
            folder, _, base = entry.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if entry.isdir() or not self._wanted(entry.name, extension):
                continue
            key = f"{folder}/{stem}"
            try:
                if chosen is not None and chosen[0] == key and chosen[1] != extension:
                    raise UserError(
                        f"{self.path}: {entry.name}: its sample has ids in .{chosen[1]} and .{extension}: say which by "
                        "--key"
                    )
                chosen = key, extension
                self._check_entry(entry, seen)
                ids = self._find(raw, entry, extension)
                goes_on = self._index(raw, ids, entry.name, goes_on)
            except BadDocument as error:
                self._skip(error)
                goes_on = False
        tar.check_end()
        if not self.rows and not self.found.skipped:
            self._bad("no ids", self._why_none(raw))

    def _wanted(self, name: str, extension: str) -> bool:
        if self.reading.key is not None:
            return extension == self.reading.key.removeprefix(".")
        return extension.rpartition(".")[2] in _KINDS

    def _check_entry(self, entry: tarfile.TarInfo, seen: set[int]) -> None:
        where = f"{self.path}: {entry.name!r}"
        number = hash(entry.name)
        if leads_out(entry.name):
            raise BadDocument("a name that leads out", f"{where}: a name that leads out of its folder: {_LEAVE_OUT}")
        if not entry.isreg() or entry.issparse():
            raise BadDocument("a link in a tar", f"{where}: a link, a device or a file with holes: {_LEAVE_OUT}")
        if number in seen:
            raise BadDocument("a key twice in a tar", f"{where}: comes twice: {_LEAVE_OUT}")
        seen.add(number)

    def _find(self, raw: IO[bytes], entry: tarfile.TarInfo, extension: str) -> _Ids:
        """Where the ids lie and how wide they are."""
        where, kind = f"{self.path}: {entry.name}", extension.rpartition(".")[2]
        if kind == "npy":
            raw.seek(entry.offset_data)
            return _npy(raw.read(min(entry.size, _NPY_HEAD)), entry, where)
        width = self.reading.width if kind not in ("u16", "u32") else {"u16": "uint16", "u32": "uint32"}[kind]
        if width is None:
            raise UserError(f"{where}: how wide its ids are is not said: set --dtype to one of {', '.join(WIDTHS)}")
        dtype = np.dtype(width).newbyteorder("<")
        if entry.size % dtype.itemsize:
            raise BadDocument("broken ids", f"{where}: {entry.size} bytes are no ids of {dtype.name}: {_LEAVE_OUT}")
        return _Ids(dtype, entry.offset_data, entry.size // dtype.itemsize)

    def _index(self, raw: IO[bytes], ids: _Ids, name: str, goes_on: bool) -> bool:
        """Adds a sample's members, all or none; whether the next one goes on with its last document."""
        reading, where = self.reading, f"{self.path}: {name}"
        if ids.number == 0:
            raise BadDocument("empty", f"{where}: holds no id: {_LEAVE_OUT}")
        if self.found.dtype is not None and ids.dtype != self.found.dtype:
            raise UserError(
                f"{where}: ids of {ids.dtype.name} after others of {self.found.dtype.name}: index them apart, and name "
                "both in data.mixture"
            )
        rows, segments, counts, documents, eos = [], [], np.zeros_like(self.found.part.token_counts), 0, 0
        segments_end = self.segments_end
        goes_on &= reading.boundaries == "eos"
        for start, content in self._pieces(raw, ids, where):
            piece = np.frombuffer(content, ids.dtype)
            if (largest := piece.max()) >= reading.vocab_size:
                raise BadDocument(
                    "ids outside of the vocabulary",
                    f"{where}: holds the id {_signed(largest)} of a vocabulary of {reading.vocab_size}: give the "
                    f"tokenizer it was made with by --tokenizer, or {_LEAVE_OUT}",
                )
            ends = np.flatnonzero(piece == reading.eos_id) + 1
            lengths = np.diff(np.union1d(ends, [len(piece)]), prepend=0)
            segments_end += len(lengths)
            rows.append((0, len(piece), start, segments_end, goes_on, np.void(member_hash(content))))
            segments.append(lengths.astype(np.uint32))
            counts += np.bincount(piece.astype(np.int64), minlength=reading.vocab_size)
            documents += len(lengths) - goes_on
            eos += len(ends)
            goes_on = not (len(ends) and ends[-1] == len(piece))
        self.found.dtype = ids.dtype
        self.found.eos += eos
        self.found.part.token_counts[:] += counts
        self.rows += rows
        self.segments += segments
        self.segments_end, self.documents = segments_end, self.documents + documents
        return goes_on

    def _pieces(self, raw: IO[bytes], ids: _Ids, where: str) -> Iterator[tuple[int, bytes]]:
        """(first byte, content) of each."""
        raw.seek(ids.start)
        position, left = ids.start, ids.number
        while left:
            take = min(left, self.reading.piece_tokens) * ids.dtype.itemsize
            content = raw.read(take)
            if len(content) < take:
                raise BadDocument("damaged tar", f"{where}: cut short: fetch the tar again, or leave it out")
            yield position, content
            position, left = position + take, left - take // ids.dtype.itemsize

    def _why_none(self, raw: IO[bytes]) -> str:
        """Of a tar without a field of ids."""
        raw.seek(0)
        names = [entry.name for _, entry in zip(range(100), Tar(raw), strict=False) if not entry.isdir()]
        kinds = {name.rpartition("/")[2].partition(".")[2] for name in names}
        if self.reading.key is not None:
            return (
                f"no sample has .{self.reading.key.removeprefix('.')} (there are {', '.join(sorted(kinds)) or 'none'})"
            )
        if kinds & {"txt", "text"}:
            return f"holds text ({names[0]}), not ids: set data.input to it and run `sisa prepare`"
        if kinds & {"json", "jsonl", "npz"} or any(kind.endswith((".gz", ".json")) for kind in kinds):
            return (
                f"holds JSON or packed data ({names[0]}): text goes through `sisa prepare`; ids have to lie in the "
                "tar as they are read: write them as .npy"
            )
        known = ", ".join("." + kind for kind in _KINDS)
        return f"no sample has ids in {known} (there are {', '.join(sorted(kinds)) or 'none'})"

    def _bad(self, reason: str, message: str) -> None:
        self._skip(BadDocument(reason, f"{self.path}: {message}"))

    def _skip(self, error: BadDocument) -> None:
        if self.reading.on_bad == "stop":
            raise error
        self.found.skipped[error.reason] += 1
        if len(self.found.examples) < _EXAMPLES:
            self.found.examples.append(str(error))


# Python 3.11 counts the depth of parsed literals once for all threads: where a collection lets another thread in, a
# good header now and then ended in "SystemError: AST constructor recursion depth mismatch".
_PARSING = threading.Lock()


def _npy(head: bytes, entry: tarfile.TarInfo, where: str) -> _Ids:
    """From the first bytes of a .npy, which are parsed as a literal and never unpickled."""
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        with _PARSING:
            shape, _, dtype = read(stream)
    except SystemError:  # the parser's own, which says nothing of the header
        raise
    except Exception as error:  # NumPy's reader of garbage raises whatever the parsers below it do
        raise BadDocument("broken ids", f"{where}: no .npy ({one_line(error)}): {_LEAVE_OUT}") from None
    if dtype.kind not in "iu" or dtype.itemsize == 1 or dtype.newbyteorder("<") != dtype:
        raise BadDocument(
            "broken ids", f"{where}: holds {dtype.str}, not little-endian integers of 16 to 64 bits: {_LEAVE_OUT}"
        )
    count = int(np.prod(shape, dtype=object))
    if len([length for length in shape if length != 1]) > 1:
        raise BadDocument(
            "broken ids", f"{where}: of shape {shape}, whose order as one text is not said: write a row a sample"
        )
    if stream.tell() + count * dtype.itemsize != entry.size:
        raise BadDocument("broken ids", f"{where}: {entry.size} bytes, its header says another number: {_LEAVE_OUT}")
    # As unsigned: a negative id is then larger than any vocabulary.
    return _Ids(np.dtype(f"<u{dtype.itemsize}"), entry.offset_data + stream.tell(), count)


def _signed(value: Any) -> int:
    bits = 8 * value.dtype.itemsize
    return int(value) - (1 << bits) if int(value) >> (bits - 1) and bits > 16 else int(value)
