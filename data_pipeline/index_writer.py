"""The index of a split, put together shard by shard from what is known of each: lengths of documents through a file.

Who writes tokens, links shards or finds them already there has a Part of each; this numbers them on and writes the
whole. It holds the members' rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import MEMBER_DTYPE, Index, write_index
from data_pipeline.shards import Part

_ROWS = 1 << 20  # of document lengths, copied at once


class IndexWriter:
    """Makes `folder` and, at `close`, the index in it. `spool`: a file that it may use until then, and removes."""

    def __init__(self, folder: Path, spool: Path, *, vocab_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._spool_path = folder, spool
        self._spool = open(spool, "wb")  # noqa: SIM115, closed by close
        self._members: list[NDArray[Any]] = []
        self._segments_end = 0
        self.shards: list[dict[str, Any]] = []
        self.documents = 0
        self.counts = np.zeros(vocab_size, np.int64)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def add(self, part: Part) -> None:
        """The next shards; a Part's `shard` numbers are as they come, one after the other from any first one."""
        self._add(part.members, part.shards, part.documents, part.token_counts, [part.segments], len(part.segments))

    def add_index(self, index: Index, shards: list[dict[str, Any]]) -> None:
        """All of a split, whose shards lie at `shards` now: name, bytes."""
        rows = int(index.members["segments_end"][-1]) if len(index.members) else 0
        stretches = (index.all_segments(at, min(at + _ROWS, rows)) for at in range(0, rows, _ROWS))
        self._add(index.members, shards, index.documents, index.token_counts, stretches, rows)

    def close(self, header: dict[str, Any]) -> None:
        """header: dtype, vocab_size, eos_id, tokenizer_sha256, and what else is to stand in index.json."""
        self._spool.close()
        segments = np.memmap(self._spool_path, "<u4", mode="r") if self._segments_end else np.empty(0, "<u4")
        write_index(
            self._folder,
            header=header | {"documents": self.documents, "shards": self.shards},
            members=np.concatenate(self._members) if self._members else np.empty(0, MEMBER_DTYPE),
            segments=segments,
            token_counts=self.counts,
        )
        del segments
        self._spool_path.unlink()

    def _add(
        self,
        members: NDArray[Any],
        shards: list[dict[str, Any]],
        documents: int,
        counts: NDArray[np.int64],
        segments: Iterable[NDArray[Any]],
        rows: int,
    ) -> None:
        members = members.copy()
        if len(members):
            members["shard"] = members["shard"].astype(np.int64) - int(members["shard"][0]) + len(self.shards)
        members["segments_end"] += np.uint64(self._segments_end)
        self._members.append(members)
        self._segments_end += rows
        self.shards += shards
        self.documents += documents
        self.counts += counts
        for stretch in segments:
            self._spool.write(stretch.astype("<u4").tobytes())
