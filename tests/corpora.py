"""A corpus of every kind of file, and `prepare` run in a process that a test can kill."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

from data_pipeline.sizes import Sizes
from samples import make_text
from sisa_dist.config import RunConfig, dump_config

# Many slices, runs, partitions and groups of a corpus of a few hundred kilobytes.
SMALL = Sizes(
    smallest_slice=9_000, largest_slice=9_000, partition=40_000, partitions=50, buffer=3_000, group=4_000, processes=1
)


def write_corpus(folder: Path) -> list[str]:
    """Writes one file of each kind, the .jsonl and .parquet long enough for several slices; returns all texts."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder.mkdir()
    texts = [make_text(i, 20 + i % 90) for i in range(330)]
    rows = [json.dumps({"text": text, "id": f"row {i}"}) + "\n" for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(rows[:150]), encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[150:190]).encode(), mtime=0))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("".join(rows[190:230]).encode()))
    table = pyarrow.table({"text": texts[230:290], "other": list(range(60))})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=7)
    with tarfile.open(folder / "e.tar", "w") as tar:
        for i in range(290, 320):
            content = texts[i].encode()
            entry = tarfile.TarInfo(f"{i:04d}.txt")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    for i in range(320, 330):
        (folder / f"f{i}.txt").write_text(texts[i], encoding="utf-8")
    return texts


def prepare_in_a_process(config: RunConfig, path: Path, *, setup: str = "") -> subprocess.Popen[str]:
    """`prepare` with SMALL sizes; `path`: where its config may lie; `setup`: code that runs first."""
    path.write_text(dump_config(config), encoding="utf-8")
    script = (
        "from pathlib import Path\nfrom data_pipeline.prepare import prepare\nfrom data_pipeline.sizes import Sizes\n"
        f"from sisa_dist.config import load_config\n{setup}\nprepare(load_config({str(path)!r}), sizes={SMALL!r})"
    )
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
