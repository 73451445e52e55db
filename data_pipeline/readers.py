"""From the bytes of one input file to its documents, each with its place in the file.

One function a kind of file. Whatever one document has wrong is a BadDocument, handed to `bad`, which raises it or
counts it (data.on_bad); damage to the file itself is raised as it comes, and slices.py makes a line of it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from data_pipeline import hub
from data_pipeline.inputs import InputFile
from data_pipeline.tars import Tar, leads_out
from data_pipeline.zst import ZstReader
from sisa_dist.config import UserError

AGAIN = "fetch or write it again, or leave it out of data.input"
_BATCH_ROWS = 256  # of parquet, decoded at once
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text. `id` is unique enough to find it again: FILE, FILE:LINE, FILE:KEY, FILE@BYTE or its own id.

    FILE@BYTE is a line of a .jsonl long enough to be read in several slices, where no slice knows its line numbers.
    """

    id: str
    text: str


class BadDocument(UserError):
    """What `on_bad: skip` passes over. `reason` is one of few: they are counted by it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # it comes back from worker processes
        return BadDocument, (self.reason, str(self))


Bad = Callable[[BadDocument], None]
Placed = tuple[int, Document]  # the place grows along the file and is the same however the file is sliced


def read_jsonl(
    file: InputFile, raw: IO[bytes], start: int, stop: int | None, text_key: str, bad: Bad
) -> Iterator[Placed]:
    """The lines that begin in bytes start … stop-1; the place is the byte."""
    position = start
    if start:
        raw.seek(start - 1)
        position += _skip_line(raw) - 1
    whole = start == 0 and stop is None
    number, before = 0, 0 if start == 0 else None
    while stop is None or position < stop:
        line = raw.readline()
        if not line:
            break
        number += 1
        if line.strip():
            try:
                row = _parse(line)
                name = f"{file.name}:{number}" if whole else f"{file.name}@{position}"
                document = Document(str(row.get("id", name)), _text_of(row, text_key))
            except _Fault as fault:
                if before is None:
                    before = _count_lines(raw, position) - number + 1
                bad(fault.at(f"{file.where}:{before + number}"))
            else:
                yield position, document
        position += len(line)


def read_packed_jsonl(file: InputFile, raw: IO[bytes], text_key: str, bad: Bad) -> Iterator[Placed]:
    """.jsonl.gz and .jsonl.zst, whole; the place is the line."""
    stream: Iterable[bytes]
    if file.kind == ".jsonl.gz":
        stream = gzip.GzipFile(fileobj=raw)
    else:
        stream = io.BufferedReader(ZstReader(raw, file.where), 1 << 20)
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                row = _parse(line)
                document = Document(str(row.get("id", f"{file.name}:{number}")), _text_of(row, text_key))
            except _Fault as fault:
                bad(fault.at(f"{file.where}:{number}"))
            else:
                yield number, document


def read_txt(file: InputFile, raw: IO[bytes], bad: Bad) -> Iterator[Placed]:
    try:
        text = _decode(raw.read())
    except _Fault as fault:
        bad(fault.at(file.where))
    else:
        yield 0, Document(file.name, text)


def read_python(file: InputFile, raw: IO[bytes], bad: Bad) -> Iterator[Placed]:
    """Python source in the encoding it declares."""
    encoding, _ = tokenize.detect_encoding(raw.readline)
    raw.seek(0)
    try:
        text = raw.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise SyntaxError(f"not the {encoding} it declares: {error.reason}") from None
    yield 0, Document(file.name, text)


def read_parquet(
    file: InputFile, raw: IO[bytes], start: int, stop: int | None, text_key: str, bad: Bad
) -> Iterator[Placed]:
    """Row groups start … stop-1; the place is the row. Raises pyarrow's ArrowInvalid where it is none."""
    table = open_parquet(file, raw)
    names = table.schema_arrow.names
    if text_key not in names:
        bad(_no_key(names, text_key).at(file.where))
        return
    columns = [text_key, "id"] if "id" in names and text_key != "id" else [text_key]
    row = sum(table.metadata.row_group(group).num_rows for group in range(start))
    for group in range(start, table.num_row_groups if stop is None else stop):
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            for values in _rows(batch):
                if isinstance(values, _Fault):
                    bad(values.at(f"{file.where}: row {row}"))
                else:
                    yield from _place(file, row, values, text_key, bad)
                row += 1


def _rows(batch: Any) -> Iterator[dict[str, Any] | _Fault]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # .parquet promises UTF-8 and checks nothing; one by one finds the row
        for row in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[row].as_py() for name in batch.schema.names}
            except UnicodeDecodeError:
                yield _Fault("not UTF-8", f"not UTF-8: {AGAIN}")


def open_parquet(file: InputFile, raw: IO[bytes]) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.where}: needs the `pyarrow` library: pip install 'sisa-dist[corpus]'") from None
    return pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)  # pages, not whole columns


def read_hub(file: InputFile, start: int, stop: int | None, text_key: str, bad: Bad) -> Iterator[Placed]:
    """Pieces start … stop-1; the place is the piece's number and the row in it."""
    assert file.url is not None
    for part in range(start, file.parts if stop is None else stop):
        for row, values in enumerate(hub.read_rows(file.url, part, file.parts)):
            yield from _place(file, part << 40 | row, values, text_key, bad)


def read_tar(file: InputFile, raw: IO[bytes], text_key: str, bad: Bad) -> Iterator[Placed]:
    """One document a sample; a sample is a run of members with one name before the first dot, as webdataset has it.

    The place is the sample's number. Holds about 60 bytes a sample, to see a key that comes twice.
    """
    tar = Tar(raw)
    sample, number, seen = _Sample(""), 0, set[int]()
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if f"{folder}/{stem}" != sample.key:
            yield from sample.document(file, number, text_key, seen, bad)
            sample, number = _Sample(f"{folder}/{stem}"), number + 1
        if extension in ("txt", "json") and not member.isdir():
            sample.add(tar.file, member, extension)
    yield from sample.document(file, number, text_key, seen, bad)
    tar.check_end()


class _Sample:
    def __init__(self, key: str) -> None:
        self.key = key
        self._parts: dict[str, tuple[str, bytes]] = {}
        self._fault: tuple[_Fault, str] | None = None

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        if not member.isfile():
            self._fault = _Fault("a link in a tar", f"a link or a device where a text should be: {AGAIN}"), member.name
        elif leads_out(member.name):
            self._fault = _Fault("a name that leads out", f"a name that leads out of its folder: {AGAIN}"), member.name
        elif extension in self._parts:
            self._fault = _Fault("a key twice in a tar", f"comes twice: {AGAIN}"), member.name
        else:
            content = tar.extractfile(member)
            assert content is not None  # None only for what is no file
            self._parts[extension] = (member.name, content.read())

    def document(self, file: InputFile, number: int, text_key: str, seen: set[int], bad: Bad) -> Iterator[Placed]:
        """The .txt; the .json beside a .txt is taken for metadata and not read."""
        if not self._parts and self._fault is None:
            return
        digest = int.from_bytes(hashlib.blake2b(self.key.encode("utf-8", "surrogateescape"), digest_size=8).digest())
        if digest in seen and self._fault is None:
            self._fault = _Fault("a key twice in a tar", f"its key came before in this tar: {AGAIN}"), self.key
        seen.add(digest)
        name = self._fault[1] if self._fault else ""
        try:
            if self._fault is not None:
                raise self._fault[0]
            extension = "txt" if "txt" in self._parts else "json"
            name, content = self._parts[extension]
            text = _decode(content) if extension == "txt" else _text_of(_parse(content), text_key)
        except _Fault as fault:
            bad(fault.at(f"{file.where}:{name}"))
        else:
            yield number, Document(f"{file.name}:{self.key.lstrip('/')}", text)


class _Fault(Exception):
    """A BadDocument that does not yet know where it is."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def at(self, where: str) -> BadDocument:
        return BadDocument(self.reason, f"{where}: {self}")


def _place(file: InputFile, row: int, values: dict[str, Any], text_key: str, bad: Bad) -> Iterator[Placed]:
    try:
        identity = values.get("id")
        name = f"{file.name}:{row}" if identity is None else str(identity)
        document = Document(name, _text_of(values, text_key))
    except _Fault as fault:
        bad(fault.at(f"{file.where}: row {row}"))
    else:
        yield row, document


def _skip_line(raw: IO[bytes]) -> int:
    """Reads to behind the next line's end, without holding the line; returns the bytes read."""
    skipped = 0
    while part := raw.readline(_SKIP_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _count_lines(raw: IO[bytes], stop: int) -> int:
    """Line ends before byte `stop`; `raw` stays where it is. Reads all that came before: for errors only."""
    stands = raw.tell()
    raw.seek(0)
    lines, left = 0, stop
    while left and (block := raw.read(min(left, _SKIP_BYTES))):
        lines, left = lines + block.count(b"\n"), left - len(block)
    raw.seek(stands)
    return lines


def _parse(content: bytes) -> dict[str, Any]:
    try:
        row = json.loads(_decode(content))
    except json.JSONDecodeError as error:
        raise _Fault("no JSON", f"not valid JSON ({error.msg}, column {error.colno}): {AGAIN}") from None
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        raise _Fault("no JSON", f"JSON that Python will not read: {AGAIN}") from None
    if not isinstance(row, dict):
        raise _Fault("no JSON", f"a JSON {type(row).__name__} where an object with a text is needed: {AGAIN}")
    return row


def _text_of(row: dict[str, Any], text_key: str) -> str:
    if text_key not in row:
        raise _no_key(list(row), text_key)
    text = row[text_key]
    if not isinstance(text, str):
        raise _Fault("no text", f"the value of {text_key!r} is no text ({type(text).__name__}): set data.text_key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault(
            "half a surrogate pair",
            f"half a surrogate pair at character {error.start}, which no UTF-8 has: mend it",
        ) from None
    return text


def _no_key(names: list[str], text_key: str) -> _Fault:
    return _Fault("no text", f"no key {text_key!r} (it has {', '.join(names) or 'none'}): set data.text_key")


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        at = f"line {line}, " if line > 1 else ""
        raise _Fault(
            "not UTF-8",
            f"not UTF-8 ({at}byte {error.start} is 0x{content[error.start]:02x}): convert it, for example with "
            "iconv -t UTF-8",
        ) from None
