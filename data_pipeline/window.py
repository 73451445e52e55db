"""From runs of tokens to one row of a batch: reads the members, shifts the labels, numbers the documents, pads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.fetch import Missing
from data_pipeline.index import Index
from data_pipeline.lines import Run
from data_pipeline.order import Int64, Range

IGNORE = -100  # a label that does not count


@dataclass(frozen=True)
class Batch:
    """tokens, labels [b, T] int64 (label −100 does not count); doc_ids [b, T] int64 non-decreasing, or None."""

    tokens: Tensor
    labels: Tensor
    doc_ids: Tensor | None


def document_of(index: Index, ranges: Sequence[Range]) -> Int64:
    """The document of each token of the ranges, counted from 0, in the order in which they stand there."""
    found: list[Int64] = []
    document, before = -1, -1
    for member, start, stop in ranges:
        inside = np.searchsorted(np.cumsum(index.segments(member)), np.arange(start, stop), side="right")
        # A member goes on with the document before it only where the one before it is the one it was cut from.
        goes_on = member == before + 1 and before >= 0 and bool(index.members["continued"][member])
        found.append(inside - inside[0] + document + (not goes_on))
        document, before = int(found[-1][-1]), member
    return np.concatenate(found)


@dataclass
class Without:
    """Shards that are done without, by name: those `known` before, which are not asked for, and those found missing."""

    known: Collection[str]
    found: set[str] = field(default_factory=set)


def read_window(index: Index, runs: Sequence[Run], seq_len: int, *, document_mask: bool) -> Batch:
    """The runs as a batch of one row, see fill_row."""
    tokens, labels = np.empty(seq_len, np.int64), np.empty(seq_len, np.int64)
    doc_ids = np.empty(seq_len, np.int64) if document_mask else None
    fill_row(index, runs, tokens, labels, doc_ids)
    return Batch(
        torch.from_numpy(tokens)[None],
        torch.from_numpy(labels)[None],
        None if doc_ids is None else torch.from_numpy(doc_ids)[None],
    )


def fill_row(
    index: Index,
    runs: Sequence[Run],
    tokens: Int64,
    labels: Int64,
    doc_ids: Int64 | None,
    *,
    without: Without | None = None,
) -> int:
    """Writes the runs side by side into `tokens` and `labels` [T]; what they leave is padded with eos and ignored
    labels. Returns how many labels count.

    A run of which a part lies in a shard that is done `without` has eos for every token and no label that counts, and
    keeps its doc_ids; without a Without, a missing shard raises Missing.

    With `doc_ids` [T] each run, and in it each document, has its own doc_id, the padding one more, and the label that
    crosses from one into the next is ignored.
    """
    seq_len, targets, position, document = len(tokens), 0, 0, -1
    labels[:] = IGNORE
    for number, run in enumerate(runs):
        ids = _read_run(index, run, without)
        absent = ids is None
        if ids is None:
            ids = np.full(sum(r.stop - r.start for r in run.ranges), index.eos_id, dtype=np.int64)
        count = len(ids) - 1  # of labels
        # The very last token stands as an input too where there is room, though nothing is asked behind it.
        inputs = min(len(ids), seq_len - position) if number == len(runs) - 1 else run.inputs
        tokens[position : position + inputs] = ids[:inputs]
        if not absent:
            labels[position : position + count] = ids[1:]
            targets += count
        if doc_ids is not None:
            documents = document_of(index, run.ranges) + document + 1
            if not absent:
                crossing = documents[1:] != documents[:-1]
                labels[position : position + count][crossing] = IGNORE
                targets -= int(np.count_nonzero(crossing))
            doc_ids[position : position + inputs] = documents[:inputs]
            document = int(documents[inputs - 1])
        position += inputs
    tokens[position:] = index.eos_id
    if doc_ids is not None:
        doc_ids[position:] = document + 1
    return targets


def wants(index: Index, run: Run, shards: Collection[str]) -> bool:
    """Whether a part of the run lies in one of `shards`."""
    return bool(shards) and any(index.shard_name(range_.member) in shards for range_ in run.ranges)


def _read_run(index: Index, run: Run, without: Without | None) -> NDArray[np.integer] | None:
    """Its ids; None where a shard is missing that may be."""
    if without is not None and wants(index, run, without.known):
        return None
    found = []
    for member, start, stop in run.ranges:
        try:
            found.append(index.read_member(member)[start:stop])
        except Missing:
            if without is None:
                raise
            without.found.add(index.shard_name(member))
            return None
    return np.concatenate(found)


def stack(rows: Sequence[Batch]) -> Batch:
    doc_ids = [row.doc_ids for row in rows if row.doc_ids is not None]
    return Batch(
        torch.cat([row.tokens for row in rows]),
        torch.cat([row.labels for row in rows]),
        torch.cat(doc_ids) if doc_ids else None,
    )
