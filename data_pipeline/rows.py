"""A rank's part of a step: windows read straight into the rows of its batches, each token copied once as an input and
once as a label.

A window whose inputs are one piece of one member costs those copies and little else; the others go window.py's way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from data_pipeline.index import Index
from data_pipeline.order import Int64, Pieces
from data_pipeline.source import Place, Places, Source
from data_pipeline.window import IGNORE, Batch, Without, fill_row


class Rows:
    """`targets`: labels that count in the rows read so far."""

    def __init__(self, tokens: Int64, labels: Int64, doc_ids: Int64 | None = None) -> None:
        """Arrays [rows, seq_len] to be filled; `doc_ids` where documents are told apart."""
        self._tokens, self._labels, self._doc_ids = tokens, labels, doc_ids
        self._seq_len, self.targets = tokens.shape[1], 0

    def read(self, source: Source, rows: Int64, places: Places, without: Without | None = None) -> None:
        """Reads the window at each of `places` into the row of the same place in `rows`, which rise.

        With a Without (see fill_row) every window goes window.py's way.
        """
        index, length, found = source.index, self._seq_len, source.pieces(places)
        if without is not None:
            found = found._replace(members=np.full_like(found.members, -1))
        for number in np.flatnonzero(found.members < 0).tolist():
            row, place = int(rows[number]), Place(source.name, int(places.epochs[number]), int(places.windows[number]))
            doc_ids = None if self._doc_ids is None else self._doc_ids[row]
            tokens, labels = self._tokens[row], self._labels[row]
            self.targets += fill_row(index, source.runs(place), tokens, labels, doc_ids, without=without)
        for at, member, start, follows in _joined(rows, found, length):
            ids, count = index.read_member(member), len(range(at.start, at.stop, at.step))
            stop = start + count * length
            self._tokens[at] = ids[start:stop].reshape(count, length)
            if follows == member:
                self._labels[at] = ids[start + 1 : stop + 1].reshape(count, length)
            else:
                last = at.stop - 1
                if count > 1:
                    kept = slice(at.start, last, at.step)
                    self._labels[kept] = ids[start + 1 : stop - length + 1].reshape(count - 1, length)
                self._labels[last, :-1] = ids[stop - length + 1 : stop]
                self._labels[last, -1] = index.read_member(follows)[0]
            self.targets += count * length
            if self._doc_ids is not None:
                ends = np.cumsum(index.segments(member))
                for number, row in enumerate(range(at.start, at.stop, at.step)):
                    behind = follows if row == at.stop - 1 else member
                    self._part(index, row, member, start + number * length, ends, behind)

    def _part(self, index: Index, row: int, member: int, start: int, ends: Int64, follows: int) -> None:
        """Parts a row that is one piece at its documents, which end before the tokens `ends` of the member."""
        assert self._doc_ids is not None
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
        tokens, labels = torch.from_numpy(self._tokens), torch.from_numpy(self._labels)
        doc_ids = None if self._doc_ids is None else torch.from_numpy(self._doc_ids)
        return [
            Batch(tokens[a : a + rows], labels[a : a + rows], None if doc_ids is None else doc_ids[a : a + rows])
            for a in range(0, len(tokens), rows)
        ]


def _joined(rows: Int64, pieces: Pieces, length: int) -> Iterator[tuple[slice, int, int, int]]:
    """(rows, member, start, follows) of pieces that are one behind the other, in rows at equal distances, as one.

    A lane's windows are that: a copy of them all is an eighth of the calls of copying each.
    """
    order = np.lexsort((pieces.starts, pieces.members))
    order = order[np.searchsorted(pieces.members[order], 0) :]
    columns = (column[order].tolist() for column in (rows, *pieces))
    at, member, start, follows, end = slice(0, 0, 0), -1, 0, 0, 0  # rows from at.start to at.stop - 1, every at.step-th
    for row, its_member, its_start, behind in zip(*columns, strict=True):
        last = at.stop - 1
        if its_member == member and its_start == end and row > last and at.step in (0, row - last):
            at, follows = slice(at.start, row + 1, row - last), behind
        else:
            if member >= 0:
                yield _stepped(at), member, start, follows
            at, member, start, follows = slice(row, row + 1, 0), its_member, its_start, behind
        end = its_start + length
    if member >= 0:
        yield _stepped(at), member, start, follows


def _stepped(at: slice) -> slice:
    return slice(at.start, at.stop, at.step or 1)
