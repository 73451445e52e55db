"""The manifest of a checkpoint: the size and SHA-256 of each of its files, so that damage is told from a bug.

It is written when all else is on the disk. A folder without one is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sisa_dist.config import UserError

NAME = "manifest.json"
FORMAT = 1  # of the whole folder; raise it with any change that an older reader would misread
_BLOCK = 1 << 20
_THREADS = 4  # hashlib lets go of the GIL: about 1.5 GB/s each with SHA instructions


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str  # hex


class Damaged(UserError):
    """Some file is not what was written. Another checkpoint may be whole."""


def hash_file(path: Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def write_manifest(folder: Path, files: Mapping[str, FileEntry]) -> None:
    entries = {name: asdict(files[name]) for name in sorted(files)}
    text = json.dumps({"format": FORMAT, "files": entries}, indent=1)
    (folder / NAME).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """By file name. Raises Damaged where it cannot be read, UserError where a newer version wrote it."""
    path = folder / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found, files = raw["format"], {name: FileEntry(**entry) for name, entry in raw["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: cannot be read ({error}): use another checkpoint") from None
    for name in files:
        if Path(name).name != name or not name:  # a path would lead out of the folder
            raise Damaged(f"{path}: {name!r} is no file's name: use another checkpoint")
    if found != FORMAT:
        raise UserError(f"{path}: format {found!r}, this version reads {FORMAT}: use the version that wrote it")
    return files


def check_files(folder: Path, files: Mapping[str, FileEntry], names: Iterable[str]) -> None:
    """Reads `names` of `folder`, all of each. Raises Damaged for the first that is not what `files` says."""
    names = list(names)
    for name in names:  # the sizes first: they cost nothing and find what is missing or cut short
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise Damaged(f"{folder / name}: {error.strerror}: use another checkpoint") from None
        if size != files[name].bytes:
            raise Damaged(
                f"{folder / name}: {size} bytes, {files[name].bytes} were written: it is damaged, use another one"
            )
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, entry in zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True):
            if entry != files[name]:
                raise Damaged(
                    f"{folder / name}: its bytes are not those that were written (SHA-256 {entry.sha256[:12]}…, "
                    f"{files[name].sha256[:12]}… in {NAME}): it is damaged, use another checkpoint"
                )


def _hash(path: Path) -> FileEntry:
    try:
        return hash_file(path)
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}: use another checkpoint") from None
