"""`sisa data reindex OUT SHARDS…`: a prepared folder over token tars of others, which stay where and as they are.

OUT holds the tokenizer, the index (foreign.py says what it can be of) and prepared.json; the shards are named in it by
their absolute paths. Bringing back the index of our own shards is rebuild.py's.
"""

from __future__ import annotations

import glob
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_pipeline.building import built_beside
from data_pipeline.foreign import Found, Reading, index_tar
from data_pipeline.index_writer import IndexWriter
from data_pipeline.manifest import write_derived
from data_pipeline.progress import Meter
from data_pipeline.slices import OnBad
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError

MADE_BY = "sisa data reindex"


def reindex(
    out: Path,
    shards: Sequence[str],
    *,
    tokenizer: Path,
    eos: str | None = None,
    validation: Sequence[str] = (),
    key: str | None = None,
    width: str | None = None,
    boundaries: Any = "eos",
    on_bad: OnBad = "stop",
    workers: int | None = None,
    quiet: bool = False,
) -> Path:
    """Makes `out`, which must not exist, of tars, folders of tars and globs; see foreign.Reading for the rest.

    Raises UserError where a shard cannot serve.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists: name another folder to make, apart from the shards")
    splits = {"train": list_tars(shards)} | ({"validation": list_tars(validation)} if validation else {})
    if both := set(splits["train"]) & set(splits.get("validation", ())):
        raise UserError(f"{min(both)}: named for training and for validation: leave it out of one")
    loaded = Tokenizer.load(tokenizer, eos=eos)
    reading = Reading(loaded.vocab_size, loaded.eos_id, key=key, width=width, boundaries=boundaries, on_bad=on_bad)
    console = Console(quiet=quiet, highlight=False)
    skipped, counts = Counter[str](), {}
    dtype: np.dtype[Any] | None = None
    with built_beside(out) as building:
        for name, content in loaded.files.items():
            (building / name).write_bytes(content)
        for split, paths in splits.items():
            writer = IndexWriter(building / split, building / "segments.spool", vocab_size=loaded.vocab_size)
            eos_found = 0
            with Meter(console, f"indexing {split}", total=sum(p.stat().st_size for p in paths)) as meter:
                for path, found in zip(paths, _read(paths, reading, workers), strict=True):
                    dtype = dtype or found.dtype
                    if found.dtype not in (None, dtype):
                        assert dtype is not None
                        raise UserError(
                            f"{path}: ids of {found.dtype} after others of {dtype.name}: index them apart, and name "
                            "both in data.mixture"
                        )
                    for line in found.examples:
                        console.print(f"skipped: {line}", soft_wrap=True, markup=False)
                    skipped.update(found.skipped)
                    eos_found += found.eos
                    if len(found.part.members):
                        writer.add(found.part)
                    meter.add(path.stat().st_size)
            if dtype is None or not writer.tokens:
                raise UserError(f"{split}: not one sample of {len(paths)} shards can serve: see what was skipped")
            if not eos_found and boundaries == "eos":
                raise UserError(
                    f"{split}: no sample holds the eos, id {loaded.eos_id}: give the tokenizer the ids were made with, "
                    "or say that each sample is a document by --documents sample"
                )
            header = {"dtype": dtype.str, "vocab_size": loaded.vocab_size, "eos_id": loaded.eos_id}
            foreign = {"documents": boundaries, "key": key}
            writer.close(header | {"tokenizer_sha256": loaded.sha256, "foreign": foreign})
            counts[split] = {"documents": writer.documents, "tokens": writer.tokens}
            console.print(f"{out / split}: {writer.documents:,} documents, {writer.tokens:,} tokens", soft_wrap=True)
        if skipped:
            console.print("skipped: " + ", ".join(f"{number:,} {why}" for why, number in sorted(skipped.items())))
        write_derived(building, MADE_BY, sources=[], counts=counts, skipped=dict(sorted(skipped.items())))
    return out


def list_tars(entries: Sequence[str]) -> list[Path]:
    """The tars behind files, folders (not searched deeper) and globs, in the order of the entries, sorted in each."""
    found: dict[Path, None] = {}
    for entry in entries:
        if "://" in entry:
            raise UserError(f"{entry}: a URL: fetch the shards first, or mount them")
        path = Path(entry).expanduser()
        if path.is_dir():
            paths = sorted(path.glob("*.tar"))
        else:
            paths = [path] if path.exists() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not paths:
            raise UserError(f"{entry}: no such tar, folder of tars or glob that matches: mend the path")
        for each in paths:
            if not each.name.endswith(".tar"):
                raise UserError(f"{each}: no .tar: name uncompressed tars")
            found[each.resolve()] = None
    return list(found)


def _read(paths: Sequence[Path], reading: Reading, workers: int | None) -> Iterator[Found]:
    """In order, on a few threads: most of it is hashing, which lets others run."""
    number = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(number, thread_name_prefix="reindex") as pool:
        waiting: deque[Future[Found]] = deque()
        try:
            for path in paths:
                if len(waiting) > number:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(index_tar, path, reading))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
