"""Batches from shards in the exact order of data_pipeline.order, read ahead by one thread.

The place in the data is one integer, the cursor: windows served so far, over epochs. It means the same at any number
of data ranks; a fingerprint says which data and order it counts in.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.index import Index
from data_pipeline.order import ORDER_VERSION, EpochOrder, epoch_order, lane_entry, num_windows, stored_order
from sisa_dist.config import UserError

IGNORE = -100  # a label that does not count


@dataclass(frozen=True)
class Batch:
    """tokens, labels [b, T] int64 (label −100 does not count); doc_ids [b, T] int64 non-decreasing, or None."""

    tokens: Tensor
    labels: Tensor
    doc_ids: Tensor | None


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one optimizer step."""

    micro_batches: list[Batch]
    next_cursor: int
    digest: str  # of the whole global batch, the same on every rank and at every dp
    num_targets: int  # labels that count, on this rank


class Loader:
    """Serves windows [cursor, cursor + global_batch_windows) a step; a rank takes the slots ≡ dp_rank mod dp_size.

    With document_mask each segment is a document of its own (doc_ids), and the label that would cross from one
    document into the next is ignored: nothing it could be predicted from is visible.
    """

    def __init__(
        self,
        index: Index,
        *,
        seq_len: int,
        seed: int,
        global_batch_windows: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        lanes: int = 8,
        document_mask: bool = False,
        prefetch: int = 4,
        source: str = "train",
    ) -> None:
        unit = dp_size * micro_batch_size
        if global_batch_windows % unit:
            below = global_batch_windows // unit * unit
            near = " or ".join(str(n * seq_len) for n in (below, below + unit) if n)
            raise UserError(
                f"training.global_batch_tokens is {global_batch_windows} windows of seq_len {seq_len}, not a "
                f"multiple of dp {dp_size} × micro_batch_size {micro_batch_size}: set it to {near}"
            )
        self._windows = num_windows(index.num_tokens, seq_len)
        if self._windows == 0:
            raise UserError(f"{index.folder}: holds {index.num_tokens} tokens, too few to train on: add text")
        self._index, self._seq_len, self._seed, self._lanes, self._source = index, seq_len, seed, lanes, source
        self._global, self._micro = global_batch_windows, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._document_mask, self._prefetch = document_mask, prefetch
        self._order = {
            "version": ORDER_VERSION,
            "seq_len": seq_len,
            "seed": seed,
            "lanes": lanes,
            "source": source,
            "document_mask": document_mask,
        }
        settings = " ".join(map(str, (index.fingerprint, *self._order.values())))
        self.fingerprint = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def describe(self) -> dict[str, Any]:
        """What the fingerprint was taken of, piece by piece, as JSON: where two differ, it shows in what."""
        index = self._index
        return {
            "fingerprint": self.fingerprint,
            "order": self._order,
            "tokenizer_sha256": index.tokenizer_sha256,
            "documents": index.documents,
            "tokens": index.num_tokens,
            "shards": index.shard_digests(),
        }

    @property
    def windows_per_epoch(self) -> int:
        return self._windows

    def steps(self, cursor: int) -> BatchStream:
        """Steps from `cursor` on, without end; use it in a `with`, so that the reading thread stops."""
        return BatchStream(self._steps(cursor), self._prefetch)

    def window_ids(self, cursor: int) -> list[tuple[int, int]]:
        """(epoch, window) of every slot of the global batch at `cursor`."""
        served = (divmod(i, self._windows) for i in range(cursor, cursor + self._global))
        return [(epoch, lane_entry(i, self._windows, self._lanes)) for epoch, i in served]

    def _steps(self, cursor: int) -> Iterator[StepBatch]:
        while True:
            ids = self.window_ids(cursor)
            mine = [self._window(*ids[slot]) for slot in range(self._dp_rank, self._global, self._dp_size)]
            batches = [_stack(mine[i : i + self._micro]) for i in range(0, len(mine), self._micro)]
            digest = hashlib.blake2b(f"{self.fingerprint} {ids}".encode(), digest_size=8).hexdigest()
            targets = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
            cursor += self._global
            yield StepBatch(batches, cursor, digest, targets)

    def _window(self, epoch: int, window: int) -> Batch:
        return _read_window(self._index, self._epoch(epoch), window, self._seq_len, self._document_mask)

    def _make_epoch(self, epoch: int) -> EpochOrder:
        return epoch_order(self._index.tokens, seed=self._seed, source=self._source, epoch=epoch)


class BatchStream:
    """An iterator whose items one daemon thread makes up to `prefetch` ahead (0: none). Errors surface in `next`."""

    def __init__(self, items: Iterator[StepBatch], prefetch: int) -> None:
        self._items = items
        self._queue: queue.Queue[StepBatch | BaseException] | None = queue.Queue(prefetch) if prefetch else None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def __enter__(self) -> BatchStream:
        if self._queue is not None:
            self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> StepBatch:
        if self._queue is None:
            return next(self._items)
        assert self._thread is not None, "use the stream in a with block"
        if self._failed is not None:
            raise self._failed
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        return item

    def _fill(self) -> None:
        assert self._queue is not None
        while not self._stop.is_set():
            item: StepBatch | BaseException
            try:
                item = next(self._items)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return


def validation_batches(
    index: Index,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """The split's first max_windows windows in stored order, dealt to ranks in turn.

    Every rank gets equally many batches; those that run out get windows whose labels are all ignored.
    """
    order = stored_order(index.tokens)
    windows = num_windows(index.num_tokens, seq_len)
    windows = windows if max_windows is None else min(windows, max_windows)
    for first in range(0, windows, batch_size * dp_size):
        rows = []
        for row in range(batch_size):
            window = first + row * dp_size + dp_rank
            if window < windows:
                rows.append(_read_window(index, order, window, seq_len, document_mask))
        if not rows:
            empty = torch.zeros(1, seq_len, dtype=torch.int64)
            rows = [Batch(empty, torch.full_like(empty, IGNORE), empty if document_mask else None)]
        yield _stack(rows)


def _read_window(index: Index, order: EpochOrder, window: int, seq_len: int, document_mask: bool) -> Batch:
    """One window as a batch of one row; a short last one is padded with eos and ignored labels."""
    ids, documents = [], []
    document, before = -1, -1
    for member, start, stop in order.locate(window * seq_len, (window + 1) * seq_len + 1):
        ids.append(index.read_member(member)[start:stop].astype(np.int64))
        if document_mask:
            inside = np.searchsorted(np.cumsum(index.segments(member)), np.arange(start, stop), side="right")
            # A member goes on with the document before it only where the one before it is the one it was cut from.
            goes_on = member == before + 1 and before >= 0 and bool(index.members["continued"][member])
            documents.append(inside - inside[0] + document + (not goes_on))
            document, before = int(documents[-1][-1]), member
    found = np.concatenate(ids)
    tokens = np.full(seq_len, index.eos_id, dtype=np.int64)
    labels = np.full(seq_len, IGNORE, dtype=np.int64)
    tokens[: min(len(found), seq_len)] = found[:seq_len]
    labels[: len(found) - 1] = found[1:]
    doc_ids = None
    if document_mask:
        seen = np.concatenate(documents)
        padded = np.full(seq_len + 1, document + 1, dtype=np.int64)
        padded[: len(seen)] = seen
        labels[padded[1:] != padded[:-1]] = IGNORE
        doc_ids = torch.from_numpy(padded[:-1].copy())[None]
    return Batch(torch.from_numpy(tokens)[None], torch.from_numpy(labels)[None], doc_ids)


def _stack(rows: list[Batch]) -> Batch:
    doc_ids = [row.doc_ids for row in rows if row.doc_ids is not None]
    return Batch(
        torch.cat([row.tokens for row in rows]),
        torch.cat([row.labels for row in rows]),
        torch.cat(doc_ids) if doc_ids else None,
    )
