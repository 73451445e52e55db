"""A rank's part of a step: windows read straight into the rows of its batches, each token copied once as an input and
once as a label.

A window whose inputs are one piece of one member costs those copies and little else; the others go window.py's way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.index import Index
from data_pipeline.order import Int64
from data_pipeline.source import Place, Places, Source
from data_pipeline.window import IGNORE, Batch, fill_row


class Rows:
    """`count` rows of `seq_len`; `targets`: labels that count in the rows read so far."""

    def __init__(self, count: int, seq_len: int, *, document_mask: bool) -> None:
        self._seq_len, self.targets = seq_len, 0
        self._tokens, self._labels = (np.empty((count, seq_len), np.int64) for _ in range(2))
        self._doc_ids = np.empty((count, seq_len), np.int64) if document_mask else None

    def read(self, source: Source, rows: Int64, places: Places) -> None:
        """Reads the window at each of `places` into the row of the same place in `rows`."""
        index, length, tokens_BT, labels_BT = source.index, self._seq_len, self._tokens, self._labels
        held: dict[int, NDArray[Any]] = {}  # lanes read on in the same few members
        columns = (column.tolist() for column in (rows, *source.pieces(places), *places))
        for row, member, start, follows, epoch, window in zip(*columns, strict=True):
            if member < 0:
                runs = source.runs(Place(source.name, epoch, window))
                doc_ids = None if self._doc_ids is None else self._doc_ids[row]
                self.targets += fill_row(index, runs, tokens_BT[row], labels_BT[row], doc_ids)
                continue
            for wanted in (member, follows):
                if wanted not in held:
                    held[wanted] = index.read_member(wanted)
            ids, stop = held[member], start + length
            tokens_BT[row] = ids[start:stop]
            if follows == member:
                labels_BT[row] = ids[start + 1 : stop + 1]
            else:
                labels_BT[row, :-1] = ids[start + 1 : stop]
                labels_BT[row, -1] = held[follows][0]
            self.targets += length
            if self._doc_ids is not None:
                self._part(index, row, member, start, follows)

    def _part(self, index: Index, row: int, member: int, start: int, follows: int) -> None:
        """Parts a row that is one piece at its documents."""
        assert self._doc_ids is not None
        ends = np.cumsum(index.segments(member))
        first, last = np.searchsorted(ends, [start, start + self._seq_len], side="right")
        cuts = ends[first:last] - start  # tokens that begin a document; the last may be the one behind the piece
        if follows == member + 1 and index.members["continued"][follows]:
            cuts = cuts[:-1]  # the document goes on there
        self._labels[row, cuts - 1] = IGNORE
        self.targets -= len(cuts)
        doc_ids = self._doc_ids[row]
        doc_ids[:] = 0
        doc_ids[cuts[cuts < self._seq_len]] = 1
        np.cumsum(doc_ids, out=doc_ids)

    def batches(self, rows: int) -> list[Batch]:
        """Batches of so many rows each, which share one storage."""
        tokens, labels = (torch.from_numpy(array).split(rows) for array in (self._tokens, self._labels))
        if self._doc_ids is None:
            return [Batch(t, y, None) for t, y in zip(tokens, labels, strict=True)]
        doc_ids = torch.from_numpy(self._doc_ids).split(rows)
        return [Batch(t, y, d) for t, y, d in zip(tokens, labels, doc_ids, strict=True)]
