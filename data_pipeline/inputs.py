"""Which files a corpus is made of: paths, folders, globs, URLs, Hugging Face datasets or Python's own sources.

It lists them in one order, says what tells today's file from another of that name, and opens them. What is inside is
for readers.py; data sets of the Hugging Face hub are in hub.py.
"""

from __future__ import annotations

import glob
import hashlib
import io
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import fsspec

from data_pipeline import hub
from sisa_dist.config import UserError

STDLIB = "python-stdlib"
KINDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar")

_BUFFER_BYTES = 1 << 20  # of a remote file

# Left out of python-stdlib: tests (17 MB that would drown the library), what others installed, the generated character
# tables of encodings, and what differs between two machines with the same Python.
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus. `name` says which it is on any machine; `mtime_ns` is 0 where time says nothing."""

    path: Path  # of a URL: its path alone
    kind: str  # one of KINDS, ".py", or "hf"
    name: str
    size: int  # bytes where it lies; 0 where nobody says
    mtime_ns: int  # of a URL: a hash of what its server gives for a version
    url: str | None = None
    parts: int = 1  # of "hf": how many pieces can be read apart
    ranges: bool = True  # whether reading can begin inside it
    entry: str = ""  # of data.input that named it

    @property
    def where(self) -> str:
        """For messages."""
        return self.url or str(self.path)


def list_files(inputs: str | list[str]) -> list[InputFile]:
    """The files behind `inputs`, sorted within each entry, each once. Raises UserError where one matches nothing."""
    entries = [inputs] if isinstance(inputs, str) else inputs
    if not entries:
        raise UserError("data.input is empty: name a file, a folder, a glob, a URL or python-stdlib")
    found: dict[str | Path, InputFile] = {}
    for entry in entries:
        for file in _entry_files(entry):
            found.setdefault(file.url or file.path.resolve(), replace(file, entry=entry))
    return list(found.values())


def open_input(file: InputFile) -> IO[bytes]:
    """`file`'s bytes as they lie there, from the start. Raises OSError, or whatever the file system of a URL raises."""
    if file.url is None:
        return open(file.path, "rb")
    filesystem, inner = fsspec.core.url_to_fs(file.url)
    # fsspec's own lines copy a block of 5 MB each; and where there are no ranges, only a stream reads beyond the first.
    if file.ranges:
        return io.BufferedReader(filesystem.open(inner, "rb"), _BUFFER_BYTES)
    return io.BufferedReader(_Stream(filesystem.open(inner, "rb", block_size=0)), _BUFFER_BYTES)


class _Stream(io.RawIOBase):
    """What can only be read from front to back, with its place in it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._position = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._stream.close()
        super().close()


def _entry_files(entry: str) -> list[InputFile]:
    if entry == STDLIB:
        return _stdlib_files()
    if entry.startswith(hub.SCHEME) and not entry.startswith(hub.FILES):
        return [_hub_file(entry)]
    if "://" in entry:
        return _remote_files(entry)
    path = Path(entry).expanduser()
    if path.is_dir():
        inside = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        paths = sorted(p for p in inside if _kind(p.name) and p.is_file())
        if not paths:
            raise UserError(f"data.input: {entry}: the folder holds no {', '.join(KINDS)} file: name another")
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not paths:
            raise UserError(f"data.input: {entry}: no such file or folder, and no glob that matches: mend the path")
    return [_local_file(p) for p in paths]


def _local_file(path: Path) -> InputFile:
    stat = path.stat()
    return InputFile(path, _known_kind(path.name, str(path)), path.name, stat.st_size, stat.st_mtime_ns)


def _remote_files(entry: str) -> list[InputFile]:
    try:
        filesystem, inner = fsspec.core.url_to_fs(entry)
        paths = sorted(filesystem.glob(inner)) if "*" in entry else [inner]
        files = [_remote_file(filesystem, path) for path in paths]
    except UserError:
        raise
    except ImportError as error:
        extra = {"s3": "s3", "http": "http", "https": "http"}.get(entry.partition("://")[0])
        remedy = f"pip install 'sisa-dist[{extra}]'" if extra else "install it"
        raise UserError(f"data.input: {entry}: cannot be reached ({one_line(error)}): {remedy}") from None
    except Exception as error:  # each file system has its own
        raise UserError(f"data.input: {entry}: cannot be reached ({one_line(error)}): mend it, or try later") from None
    if not files:
        raise UserError(f"data.input: {entry}: no glob that matches: mend the path")
    return files


def _remote_file(filesystem: Any, path: str) -> InputFile:
    url = path if "://" in path else filesystem.unstrip_protocol(path)
    inside = Path(urlsplit(url).path)
    kind = _known_kind(inside.name, url)
    info = filesystem.info(path)
    version = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "updated", "created") if key in info]
    number = int.from_bytes(hashlib.blake2b("\n".join(version).encode(), digest_size=6).digest(), "big")
    size = info.get("size") or 0
    ranges = bool(size) and (urlsplit(url).scheme not in ("http", "https") or _gives_ranges(url))
    return InputFile(inside, kind, inside.name, size, number if version else 0, url, ranges=ranges)


def _gives_ranges(url: str) -> bool:
    """Asked of the server itself: few say so in a header, and fsspec takes it for granted."""
    try:
        with urlopen(Request(url, headers={"Range": "bytes=0-0"}), timeout=30) as answer:
            return bool(answer.status == 206)
    except OSError:
        return False


def _hub_file(entry: str) -> InputFile:
    found = hub.look_up(entry)
    return InputFile(Path(found.name), "hf", found.name, found.size, found.version, found.url, parts=found.parts)


def _known_kind(name: str, where: str) -> str:
    kind = _kind(name)
    if kind is None:
        raise UserError(f"data.input: {where}: not a kind this reads; turn it into one of {', '.join(KINDS)}")
    return kind


def _kind(name: str) -> str | None:
    return next((kind for kind in KINDS if name.endswith(kind)), None)


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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
