"""`sisa data merge`: several prepared folders of one tokenizer as one, whose tokens are theirs one after another.

Shards are hard links of the inputs' where the file system has them, else copies: no token is rewritten, no disk is
taken twice where it can be helped, and what is made is whole by itself, to be moved, served or uploaded, after the
inputs are gone. (An index may name shards anywhere, so a merge by index alone would work; it would break with the first
input that is moved.) They are numbered on under new names, since every folder has a 000000.tar. Shards that an input
itself only refers to stay where they are. The inputs are read, never touched.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.building import built_beside
from data_pipeline.index import Index
from data_pipeline.index_writer import IndexWriter
from data_pipeline.manifest import read_manifest, write_derived
from data_pipeline.places import is_url
from data_pipeline.prepared import SPLITS, open_split
from data_pipeline.progress import Meter
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_card import CARD
from sisa_dist.config import UserError

MADE_BY = "sisa data merge"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def merge(out: Path, inputs: Sequence[Path], *, copy: bool = False, quiet: bool = False) -> Path:
    """Makes `out`, which must not exist. `copy`: never link.

    Raises UserError where the inputs' tokenizers, id widths or formats differ, or one is damaged, twice there or no
    prepared folder.
    """
    if len(inputs) < 2:
        raise UserError("merge: name the folder to make and at least two prepared folders")
    if any(is_url(place) for place in (out, *inputs)):
        raise UserError("merge: works on local folders: fetch what lies at a URL first")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists: name another folder to make")
    same = [path for number, path in enumerate(inputs) if path.resolve() in [p.resolve() for p in inputs[:number]]]
    if same:
        raise UserError(f"{same[0]}: named twice: its tokens would be there twice; weigh it up by data.mixture instead")
    splits = [{name: open_split(path, name) for name in SPLITS} for path in inputs]
    tokenizer = _check_alike(inputs, splits)
    console = Console(quiet=quiet, highlight=False)
    with built_beside(out) as building:
        for name, content in tokenizer.files.items():
            (building / name).write_bytes(content)
        card = inputs[0] / CARD
        if card.is_file():
            shutil.copyfile(card, building / CARD)
        for name in SPLITS:
            found = [index for each in splits if (index := each[name]) is not None]
            if found:
                _merge_split(building / name, found, console, copy=copy)
        _write_manifest(building, inputs, splits)
    return out


def _check_alike(inputs: Sequence[Path], splits: Sequence[dict[str, Index | None]]) -> Tokenizer:
    """The tokenizer of all of them."""
    first = None
    for path, each in zip(inputs, splits, strict=True):
        if each["train"] is None:
            raise UserError(f"{path}: no prepared data here: name folders that `sisa prepare` or `sisa data` made")
        for index in each.values():
            if index is None:
                continue
            first = first or index
            if index.tokenizer_sha256 != first.tokenizer_sha256:
                raise UserError(
                    f"{path}: made with another tokenizer than {inputs[0]} ({index.tokenizer_sha256[:12]}, "
                    f"{first.tokenizer_sha256[:12]}): prepare it with data.tokenizer.path={inputs[0]}/…"
                )
            if (index.dtype, index.foreign) != (first.dtype, first.foreign):
                kinds = [f"{'foreign ' if i.foreign else ''}{i.dtype.name}" for i in (index, first)]
                raise UserError(
                    f"{path}: holds ids as {kinds[0]} and {inputs[0]} as {kinds[1]}, which one index cannot: name both "
                    "in data.mixture instead"
                )
    tokenizer = Tokenizer.load(inputs[0])
    assert first is not None
    if tokenizer.sha256 != first.tokenizer_sha256:
        raise UserError(f"{inputs[0]}: its shards have another {tokenizer.path.name}: `sisa data verify` says more")
    return tokenizer


def _merge_split(folder: Path, found: Sequence[Index], console: Console, *, copy: bool) -> None:
    first = found[0]
    writer = IndexWriter(folder, folder.parent / "segments.spool", vocab_size=first.vocab_size)
    total = sum(shard["bytes"] for index in found for shard in index.shards)
    with Meter(console, f"merging {folder.name}", total=total) as meter:
        for index in found:
            shards: list[dict[str, Any]] = []
            for path, shard in zip(index.shard_paths, index.shards, strict=True):
                name = path
                if not is_url(path) and not os.path.isabs(shard["name"]):
                    name = f"{len(writer.shards) + len(shards):06d}.tar"
                    _link(path, folder / name, copy=copy)
                shards.append({"name": name, "bytes": shard["bytes"]})
                meter.add(shard["bytes"])
            writer.add_index(index, shards)
    header: dict[str, Any] = {
        "dtype": first.dtype.str,
        "vocab_size": first.vocab_size,
        "eos_id": first.eos_id,
        "tokenizer_sha256": first.tokenizer_sha256,
    }
    writer.close(header | ({"foreign": True} if first.foreign else {}))


def _link(source: str, target: Path, *, copy: bool) -> None:
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    shutil.copyfile(source, target)


def _write_manifest(folder: Path, inputs: Sequence[Path], splits: Sequence[dict[str, Index | None]]) -> None:
    sources: list[dict[str, Any]] = []
    counts: dict[str, Any] = {}
    skipped: dict[str, Any] = {}
    passes: dict[str, Any] = {}
    for path, each in zip(inputs, splits, strict=True):
        made = read_manifest(path) or {"settings": {}}
        train = each["train"]
        assert train is not None
        sources.append(
            {
                "folder": str(path),
                "fingerprint": train.fingerprint,
                "tokens": train.num_tokens,
                "settings": made["settings"],
                **({"sources": made["sources"]} if "sources" in made else {}),
            }
        )
        counts = _sum(counts, made.get("counts", {}))
        skipped = _sum(skipped, made.get("skipped", {}))
        passes = _sum(passes, made.get("passes", {}))
    write_derived(folder, MADE_BY, sources=sources, counts=counts, skipped=skipped, passes=passes or None)


def _sum(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Key by key, as deep as they go."""
    added = dict(one)
    for key, value in two.items():
        if isinstance(value, dict):
            added[key] = _sum(added.get(key, {}), value)
        else:
            added[key] = added.get(key, 0) + value
    return added
