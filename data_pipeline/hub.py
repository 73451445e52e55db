"""Data sets by their Hugging Face names, streamed: hf://NAME?split=train&config=…&revision=…

NAME is OWNER/NAME on the hub, or a folder (hf:///data/mine) as `datasets` reads one. The hub's current commit is looked
up once and then asked for by its hash, so that a push in mid-run changes nothing. `hf://datasets/…` is not ours: that
is fsspec's name for single files. The `datasets` library is asked for only here, and only then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from sisa_dist.config import UserError

SCHEME, FILES = "hf://", "hf://datasets/"
_KEYS = ("split", "config", "revision")


@dataclass(frozen=True)
class Found:
    """url: with the revision settled; size: bytes, 0 where unknown; version: changes with the content."""

    name: str
    url: str
    size: int
    version: int
    parts: int


def look_up(url: str) -> Found:
    """What `url` stands for now. Raises UserError, one line, without the library, the network or the data set."""
    name, options = _parse(url)
    folder = Path(name)
    if folder.is_dir():
        stats = [(str(p.relative_to(folder)), p.stat()) for p in sorted(folder.rglob("*")) if p.is_file()]
        content = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    else:
        options["revision"] = content = _commit(url, name, options.get("revision"))
    settled = f"{SCHEME}{name}?{urlencode(options)}"
    stream = _stream(settled)
    size = 0
    if stream.info.splits and options["split"] in stream.info.splits:
        size = stream.info.splits[options["split"]].num_bytes or 0
    version = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big")
    known_as = folder.name if folder.is_dir() else name
    return Found(f"{known_as}:{options['split']}", settled, size, version, int(stream.num_shards))


def read_rows(url: str, part: int, parts: int) -> Iterator[dict[str, Any]]:
    """The rows of one of `parts` pieces, in the data set's order. Raises what `datasets` raises while it reads."""
    yield from _stream(url).shard(num_shards=parts, index=part)


def _parse(url: str) -> tuple[str, dict[str, str]]:
    name, _, query = url.removeprefix(SCHEME).partition("?")
    options = dict(parse_qsl(query))
    if unknown := sorted(set(options) - set(_KEYS)):
        raise UserError(f"data.input: {url}: {unknown[0]!r} is none of {', '.join(_KEYS)}: leave it out")
    if not name or "split" not in options:
        raise UserError(f"data.input: {url}: which split? write {SCHEME}{name or 'OWNER/NAME'}?split=train")
    return name, options


def _commit(url: str, name: str, revision: str | None) -> str:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise _missing(url) from None
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=20).sha)
    except Exception as error:  # its own kinds, httpx's, and those of whatever lies below
        raise _unreachable(url, error) from None


def _stream(url: str) -> Any:
    name, options = _parse(url)
    try:
        import datasets
    except ImportError:
        raise _missing(url) from None
    try:
        return datasets.load_dataset(
            name, options.get("config"), split=options["split"], revision=options.get("revision"), streaming=True
        )
    except Exception as error:  # a missing split, a broken builder, no network: all kinds
        raise _unreachable(url, error) from None


def _missing(url: str) -> UserError:
    return UserError(f"data.input: {url}: needs the `datasets` library: pip install 'sisa-dist[corpus]'")


def _unreachable(url: str, error: BaseException) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"data.input: {url}: cannot be read from the hub ({reason[:200]}): mend it, or try when online")
