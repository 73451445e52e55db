"""Whole documents in bins of seq_len: `best_fit`, planned inside fixed groups, so that any bin is found by prefix sums.

A group is some consecutive members (or, where a stage of a run ended in mid-epoch, some consecutive slots of what was
left unread). Only how many bins each group fills is kept; its plan is made again when one of its bins is asked for. A
document is cut only where it is longer than seq_len, and no label crosses from one document to the next.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.bin_counts import kept_counts
from data_pipeline.index import Index
from data_pipeline.lines import Line, Run
from data_pipeline.order import Int64, stored_order
from data_pipeline.window import document_of

PACKING_VERSION = 1  # in the loader's fingerprint: raise it with any change here that serves another order
_GROUP_TOKENS = 1 << 20  # 2 MB of uint16; a lane holds one or two groups in memory
_GROUP_BINS = 8  # and at least so many bins: in fewer, documents do not fit well


class Pieces(Protocol):
    """Documents, or what is left of them, in groups. A piece's inputs are its tokens; see Run for its tail."""

    groups: int

    def lengths(self, group: int) -> tuple[Int64, np.ndarray]:
        """Inputs of each piece, at least 1, and whether a token follows that is the last one's label."""
        ...

    def part(self, group: int, piece: int, start: int, stop: int, *, tail: bool) -> Run: ...

    def counts(self, seq_len: int, count: Callable[[], Int64]) -> Int64:
        """Bins and slots of each group, [2, groups]: `count()`, or what is known of it already."""
        ...


def group_tokens(seq_len: int) -> int:
    return max(_GROUP_TOKENS, _GROUP_BINS * seq_len)


class Documents:
    """All documents of a split, as they were stored. One that spans groups belongs to the group it begins in."""

    def __init__(self, index: Index, seq_len: int) -> None:
        self._index = index
        self._members = max(1, group_tokens(seq_len) // int(index.tokens.max()))  # of a group
        self._order = stored_order(index.tokens)
        self.groups = -(-len(index.members) // self._members)
        self._of = lru_cache(maxsize=64)(self._find)

    def lengths(self, group: int) -> tuple[Int64, np.ndarray]:
        lengths = np.diff(self._of(group))
        return lengths, np.zeros(len(lengths), dtype=bool)

    def part(self, group: int, piece: int, start: int, stop: int, *, tail: bool) -> Run:
        begin = int(self._of(group)[piece])
        return Run(tuple(self._order.locate(begin + start, begin + stop + tail)), stop - start)

    def counts(self, seq_len: int, count: Callable[[], Int64]) -> Int64:
        name = f"best_fit_{seq_len}_{self._members}_v{PACKING_VERSION}"
        return kept_counts(self._index, name, self.groups, count)

    def _find(self, group: int) -> Int64:
        """Places in the stored stream where the group's documents begin, and where the last of them ends."""
        first, stop = group * self._members, min((group + 1) * self._members, len(self._index.members))
        begin = int(self._order.ends[first - 1]) if first else 0
        bounds = [np.array([begin])]
        for member in range(first, stop):
            parts = np.cumsum(self._index.segments(member)) + (int(self._order.ends[member - 1]) if member else 0)
            if self._index.members["continued"][member]:
                bounds[-1] = bounds[-1][:-1]  # no document ends where the member before does
            bounds.append(parts)
        found = np.concatenate(bounds)
        while stop < len(self._index.members) and self._index.members["continued"][stop]:
            parts = self._index.segments(stop)
            found[-1:] = found[-1:] + parts[0]  # of nothing, where a longer document covers the group
            if len(parts) > 1:
                break
            stop += 1
        return found


class Rest:
    """What a line still holds, cut where its documents (or the line's own pieces of them) end."""

    def __init__(self, index: Index, line: Line, seq_len: int) -> None:
        self._index, self._line, self._slots = index, line, group_tokens(seq_len)
        self.groups = -(-line.slots // self._slots)
        self._of = lru_cache(maxsize=64)(self._find)

    def lengths(self, group: int) -> tuple[Int64, np.ndarray]:
        runs = self._of(group)
        return np.array([run.inputs for run in runs]), np.array([run.tail for run in runs])

    def part(self, group: int, piece: int, start: int, stop: int, *, tail: bool) -> Run:
        return self._of(group)[piece].part(start, stop, tail=tail)

    def counts(self, seq_len: int, count: Callable[[], Int64]) -> Int64:
        return count()

    def _find(self, group: int) -> list[Run]:
        found = []
        start = group * self._slots
        for run in self._line.runs(start, min(start + self._slots, self._line.slots)):
            document = document_of(self._index, run.ranges)
            cuts = [0, *(np.flatnonzero(np.diff(document[: run.inputs])) + 1).tolist(), run.inputs]
            for a, b in pairwise(cuts):
                tail = b < len(document) and bool(document[b] == document[b - 1])
                found.append(run.part(a, b, tail=tail))
        return found


class _Plan(NamedTuple):
    """The chunks of a group, bin after bin: inputs start … stop-1 of a piece; bin b has rows ends[b-1] … ends[b]-1."""

    piece: Int64
    start: Int64
    stop: Int64
    tail: np.ndarray
    ends: Int64


class Bins:
    """How the pieces fill bins of seq_len, in any epoch. counts, slots: of each group, int64."""

    def __init__(self, pieces: Pieces, seq_len: int, *, plans: int = 32) -> None:
        """`plans`: groups kept planned; about one a lane is in use at a time."""
        self.pieces, self.seq_len, self.plans = pieces, seq_len, plans
        self.plan = lru_cache(maxsize=plans)(self._plan)
        self.counts, self.slots = pieces.counts(seq_len, self._count)

    @property
    def padding(self) -> float:
        """The share of an epoch's slots that hold no token."""
        return 1 - int(self.slots.sum()) / max(1, int(self.counts.sum()) * self.seq_len)

    def _count(self) -> Int64:
        found = np.empty((2, self.pieces.groups), np.int64)
        for group in range(self.pieces.groups):
            _, start, stop, _ = self._chunks(group)
            found[:, group] = best_fit(stop - start, self.seq_len)[1], (stop - start).sum()
        return found

    def _chunks(self, group: int) -> tuple[Int64, Int64, Int64, np.ndarray]:
        """(piece, start, stop, tail) of each chunk, in stored order: one a piece that is no longer than a bin.

        The token that closes a document has no label: it is no input where that alone would need another chunk.
        """
        inputs, tails = self.pieces.lengths(group)
        labels = inputs - ~tails  # those that count
        number = np.maximum(1, -(-labels // self.seq_len))
        piece = np.repeat(np.arange(len(inputs)), number)
        start = (np.arange(len(piece)) - np.repeat(np.cumsum(number) - number, number)) * self.seq_len
        last = np.append(piece[1:] != piece[:-1], True)[: len(piece)]
        stop = np.where(last, np.minimum(inputs[piece], start + self.seq_len), start + self.seq_len)
        return piece, start, stop, ~last | tails[piece] | (stop < inputs[piece])

    def _plan(self, group: int) -> _Plan:
        piece, start, stop, tail = self._chunks(group)
        bins, count = best_fit(stop - start, self.seq_len)
        rows = np.argsort(bins, kind="stable")
        ends = np.cumsum(np.bincount(bins, minlength=count))
        return _Plan(piece[rows], start[rows], stop[rows], tail[rows], ends)


class Packed:
    """An epoch's bins as windows, and their slots as a line: the groups in `order`, the bins of a group shuffled."""

    def __init__(self, bins: Bins, order: Int64, shuffle: Callable[[int, int], Int64]) -> None:
        """`shuffle(group, n)`: a permutation of a group's n bins, which best fit sorts by length."""
        self._bins, self._order, self._shuffle = bins, order, shuffle
        self._bin_ends, self._slot_ends = np.cumsum(bins.counts[order]), np.cumsum(bins.slots[order])
        self.count = int(self._bin_ends[-1])
        self.slots = int(self._slot_ends[-1])
        self._laid = lru_cache(maxsize=bins.plans)(self._lay)

    def window(self, number: int) -> list[Run]:
        slot, inside = self._find(self._bin_ends, number)
        return self._runs(int(self._order[slot]), inside)

    def first_slot(self, number: int) -> int:
        if number == self.count:
            return self.slots
        slot, inside = self._find(self._bin_ends, number)
        before = int(self._slot_ends[slot - 1]) if slot else 0
        return before + int(self._laid(int(self._order[slot]))[1][inside])

    def fill(self, number: int) -> int:
        return self.first_slot(number + 1) - self.first_slot(number)

    def fills(self, numbers: Int64) -> int:
        return sum(self.fill(number) for number in numbers.tolist())

    def pieces(self, numbers: Int64) -> None:
        return None  # a bin is many

    def runs(self, start: int, stop: int) -> list[Run]:
        found = []
        while start < stop:
            slot, inside = self._find(self._slot_ends, start)
            group = int(self._order[slot])
            begins = self._laid(group)[1]
            number = int(np.searchsorted(begins, inside, side="right")) - 1
            skip, take = inside - int(begins[number]), min(stop - start, int(begins[number + 1]) - inside)
            start += take
            for run in self._runs(group, number):
                a, b = min(skip, run.inputs), min(skip + take, run.inputs)
                if a < b:
                    found.append(run.part(a, b, tail=b < run.inputs or run.tail))
                skip, take = skip - a, take - (b - a)
        return found

    def _lay(self, group: int) -> tuple[Int64, Int64]:
        """The group's bins as they are served, and the slots before each of them and after the last."""
        plan, count = self._bins.plan(group), int(self._bins.counts[group])
        order = self._shuffle(group, count)
        ends = np.concatenate([[0], np.cumsum(plan.stop - plan.start)])[np.concatenate([[0], plan.ends])]
        return order, np.concatenate([[0], np.cumsum(np.diff(ends)[order])])

    def _runs(self, group: int, number: int) -> list[Run]:
        plan, chosen = self._bins.plan(group), int(self._laid(group)[0][number])
        rows = range(int(plan.ends[chosen - 1]) if chosen else 0, int(plan.ends[chosen]))
        return [
            self._bins.pieces.part(
                group, int(plan.piece[row]), int(plan.start[row]), int(plan.stop[row]), tail=bool(plan.tail[row])
            )
            for row in rows
        ]

    @staticmethod
    def _find(ends: Int64, place: int) -> tuple[int, int]:
        slot = int(np.searchsorted(ends, place, side="right"))
        return slot, place - (int(ends[slot - 1]) if slot else 0)


def best_fit(lengths: Int64, size: int) -> tuple[Int64, int]:
    """(bin of each length ≤ size, number of bins). Best fit decreasing; of equally good bins the one that was fed last.

    About 1 µs a length.
    """
    order = np.argsort(-lengths, kind="stable")
    rooms: list[int] = []  # what is left in the bins that are not full, ascending, each once
    open_bins: dict[int, list[int]] = {}
    chosen, count = [], 0
    for length in lengths[order].tolist():
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, room, count = count, size, count + 1
        else:
            room = rooms[place]
            number = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[place]
        if left := room - length:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(number)
        chosen.append(number)
    found = np.empty(len(lengths), np.int64)
    found[order] = chosen
    return found, count
