"""Where text comes from: the user's files, or Python's own standard library, as one deterministic list of documents.

It reads and checks; it does not filter, deduplicate, tokenise or split. Whatever is damaged stops it with a UserError
that names the file: half a corpus that looks whole would train a different model without anybody noticing.
"""

from __future__ import annotations

import glob
import gzip
import json
import sysconfig
import tarfile
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sisa_dist.config import UserError

STDLIB = "python-stdlib"
KINDS = (".txt", ".jsonl", ".jsonl.gz", ".tar")
_AGAIN = "fetch or write it again, or leave it out of data.input"

# Left out of python-stdlib: tests (17 MB that would drown the library), what others installed, the generated character
# tables of encodings, and what differs between two machines with the same Python.
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text. `id` is unique enough to find it again: FILE, FILE:LINE, FILE:KEY or its own id."""

    id: str
    text: str


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus. `name` says which it is on any machine; `mtime_ns` is 0 where time says nothing."""

    path: Path
    kind: str  # one of KINDS, or ".py"
    name: str
    size: int  # bytes on disk
    mtime_ns: int


class Corpus:
    """The documents of `inputs`, in the same order every time, with the bytes read so far for a progress bar.

    inputs: one or more of a file, a folder (searched whole, dot files skipped), a glob, or "python-stdlib". A file
    reached twice is read once. A .txt file is one document; of a .jsonl the value at `text_key` of every line (and
    `id`, where there is one); of a WebDataset .tar every sample's .txt, or else its .json's `text_key`.
    Empty texts inside a file are skipped, a file without any text is a UserError, and so is one that is missing,
    damaged, cut short, not UTF-8 or without the key: the message names file and line.
    """

    def __init__(self, inputs: str | list[str], text_key: str = "text") -> None:
        self.files = list_files(inputs)
        self.total_bytes = sum(file.size for file in self.files)
        self._text_key = text_key
        self._done = 0
        self._open: IO[bytes] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files on disk consumed by the iteration now under way (of `total_bytes`)."""
        return self._done + (self._open.tell() if self._open is not None and not self._open.closed else 0)

    def __iter__(self) -> Iterator[Document]:
        self._done = 0
        for file in self.files:
            empty = True
            for document in self._read(file):
                if document.text:
                    empty = False
                    yield document
            if empty and file.kind != ".py":
                raise UserError(f"{file.path}: holds no text: {_AGAIN}")
            self._done += file.size

    def _read(self, file: InputFile) -> Iterator[Document]:
        try:
            with open(file.path, "rb") as raw:
                self._open = raw
                if file.kind == ".py":
                    yield Document(file.name, _decode_python(raw))
                elif file.kind == ".txt":
                    yield Document(file.name, _decode(raw.read(), str(file.path)))
                elif file.kind == ".tar":
                    yield from _read_tar(file, raw, self._text_key)
                elif file.kind == ".jsonl.gz":
                    with gzip.GzipFile(fileobj=raw) as stream:
                        yield from _read_lines(file, stream, self._text_key)
                else:
                    yield from _read_lines(file, raw, self._text_key)
        except (OSError, EOFError, zlib.error, tarfile.TarError, SyntaxError) as error:
            raise UserError(f"{file.path}: damaged, cut short or unreadable ({_line(error)}): {_AGAIN}") from None
        finally:
            self._open = None


def iter_documents(inputs: str | list[str], text_key: str = "text") -> Iterator[Document]:
    """The documents of `inputs`; see Corpus."""
    return iter(Corpus(inputs, text_key))


def list_files(inputs: str | list[str]) -> list[InputFile]:
    """The files behind `inputs`, sorted within each entry, each once. Raises UserError where one matches nothing."""
    entries = [inputs] if isinstance(inputs, str) else inputs
    if not entries:
        raise UserError("data.input is empty: name a file, a folder, a glob or python-stdlib")
    found: dict[Path, InputFile] = {}
    for entry in entries:
        for file in _stdlib_files() if entry == STDLIB else _entry_files(entry):
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def _entry_files(entry: str) -> list[InputFile]:
    path = Path(entry).expanduser()
    if path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        paths = sorted(p for p in inside if _kind(p) and p.is_file())
        if not paths:
            raise UserError(f"data.input: {entry}: the folder holds no {', '.join(KINDS)} file: name another")
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not paths:
            raise UserError(f"data.input: {entry}: no such file or folder, and no glob that matches: mend the path")
    return [_input_file(p) for p in paths]


def _input_file(path: Path) -> InputFile:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"data.input: {path}: not a kind this reads; turn it into one of {', '.join(KINDS)}")
    stat = path.stat()
    return InputFile(path, kind, path.name, stat.st_size, stat.st_mtime_ns)


def _kind(path: Path) -> str | None:
    return next((kind for kind in KINDS if path.name.endswith(kind)), None)


def _stdlib_files() -> list[InputFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_SKIP.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            files.append(InputFile(path, ".py", str(relative), path.stat().st_size, 0))
    if not files:
        raise UserError(f"data.input: {STDLIB}: this Python has no sources at {root}: set data.input to your own files")
    return files


def _read_lines(file: InputFile, stream: Iterable[bytes], text_key: str) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        where = f"{file.path}:{number}"
        if not line.strip():
            continue
        row = _parse(line, where)
        yield Document(str(row.get("id", f"{file.name}:{number}")), _text_of(row, text_key, where))


def _read_tar(file: InputFile, raw: IO[bytes], text_key: str) -> Iterator[Document]:
    """One document a sample; a sample is a run of members with one name before the first dot, as webdataset has it."""
    with tarfile.open(fileobj=raw, mode="r:") as tar:
        key, parts = "", dict[str, tuple[str, bytes]]()
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header, and a tar may hold millions
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if f"{folder}/{stem}" != key:
                yield from _sample(file, key, parts, text_key)
                key, parts = f"{folder}/{stem}", {}
            if member.isfile() and extension in ("txt", "json"):
                content = tar.extractfile(member)
                assert content is not None  # None only for what is no file
                parts[extension] = (member.name, content.read())
        yield from _sample(file, key, parts, text_key)
        _check_tar_end(tar, raw)


def _sample(file: InputFile, key: str, parts: dict[str, tuple[str, bytes]], text_key: str) -> Iterator[Document]:
    """The document of one tar sample: its .txt; the .json beside a .txt is taken for metadata and not read."""
    for extension in ("txt", "json"):
        if extension in parts:
            name, content = parts[extension]
            where = f"{file.path}:{name}"
            text = _decode(content, where) if extension == "txt" else _text_of(_parse(content, where), text_key, where)
            yield Document(f"{file.name}:{key.lstrip('/')}", text)
            return


def _check_tar_end(tar: tarfile.TarFile, raw: IO[bytes]) -> None:
    """tarfile stops without a word at a damaged or cut header, and at the first end mark of two joined tars."""
    raw.seek(tar.offset)
    if raw.read(512) != bytes(512):
        raise tarfile.ReadError("no end mark after the last member")
    while block := raw.read(1 << 20):
        if block.count(0) != len(block):
            raise tarfile.ReadError("data after the end mark: two tars joined?")


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(_decode(content, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}): {_AGAIN}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__} where an object with a text is needed: {_AGAIN}")
    return row


def _text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    if text_key not in row:
        raise UserError(f"{where}: no key {text_key!r} (it has {', '.join(row) or 'none'}): set data.text_key")
    text = row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: the value of {text_key!r} is no text ({type(text).__name__}): set data.text_key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a surrogate pair at character {error.start}, which no UTF-8 has: mend it"
        ) from None
    return text


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        at = f"line {line}, " if line > 1 else ""
        raise UserError(
            f"{where}: not UTF-8 ({at}byte {error.start} is 0x{content[error.start]:02x}): convert it, for example "
            "with iconv -t UTF-8"
        ) from None


def _decode_python(raw: IO[bytes]) -> str:
    """Python source in the encoding it declares."""
    encoding, _ = tokenize.detect_encoding(raw.readline)
    raw.seek(0)
    try:
        return raw.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise SyntaxError(f"not the {encoding} it declares: {error.reason}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
