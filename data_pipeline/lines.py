"""What windows are cut from: a line is a row of slots, each one input token with its label, in an exact order.

`Stream` is an epoch's members one after another; `Cut` is some intervals of another line, as a change of stage leaves
them; packing.Packed is the bins of whole documents. A line reads nothing: it says which tokens of which members come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.order import EpochOrder, Int64, Pieces, Range


class Run(NamedTuple):
    """Consecutive tokens, the first `inputs` of which are inputs.

    The ranges hold them, and one token more where the last input's label counts: each token's successor is its label.
    """

    ranges: tuple[Range, ...]
    inputs: int

    @property
    def tail(self) -> bool:
        """The last input has a label."""
        return sum(r.stop - r.start for r in self.ranges) > self.inputs

    def part(self, start: int, stop: int, *, tail: bool) -> Run:
        """Its inputs start … stop-1; with `tail` the token after them is there as the last one's label."""
        ranges, position, end = [], 0, stop + tail
        for member, first, last in self.ranges:
            a, b = max(start - position, 0), min(end - position, last - first)
            if a < b:
                ranges.append(Range(member, first + a, first + b))
            position += last - first
        return Run(tuple(ranges), stop - start)


class Line(Protocol):
    @property
    def slots(self) -> int: ...

    def runs(self, start: int, stop: int) -> list[Run]:
        """Slots start … stop-1 < slots, in order."""
        ...


class Numbering(Protocol):
    """Windows over a line. `count`: how many."""

    @property
    def count(self) -> int: ...

    @property
    def slots(self) -> int: ...

    def window(self, number: int) -> list[Run]: ...

    def first_slot(self, number: int) -> int:
        """Slots of the windows before `number` ≤ count."""
        ...

    def fill(self, number: int) -> int:
        """Slots of that window; the rest of its seq_len is padding."""
        ...

    def fills(self, numbers: Int64) -> int:
        """Their sum over windows."""
        ...

    def pieces(self, numbers: Int64) -> Pieces | None:
        """The windows whose inputs are one piece of one member; None where that is not looked for.

        A short cut for reading: `window` is the truth.
        """
        ...


class Stream:
    """Every token but the last is an input, every token but the first its label."""

    def __init__(self, order: EpochOrder) -> None:
        self.order = order
        self.slots = max(0, int(order.ends[-1]) - 1)

    def runs(self, start: int, stop: int) -> list[Run]:
        return [Run(tuple(self.order.locate(start, stop + 1)), stop - start)]


class Cut:
    """Some intervals [a, b) of a line's slots, as a line of their own."""

    def __init__(self, line: Line, intervals: Sequence[Sequence[int]]) -> None:
        self.line, self.intervals = line, [(int(a), int(b)) for a, b in intervals]
        self._ends = np.cumsum([b - a for a, b in self.intervals], dtype=np.int64)
        self.slots = int(self._ends[-1])

    def inner(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Slots start … stop-1 as intervals of the line cut from."""
        found = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            a, b = self.intervals[number]
            begin = int(self._ends[number]) - (b - a)
            upto = min(stop, int(self._ends[number]))
            found.append((a + start - begin, a + upto - begin))
            start, number = upto, number + 1
        return found

    def runs(self, start: int, stop: int) -> list[Run]:
        return [run for a, b in self.inner(start, stop) for run in self.line.runs(a, b)]


class Concat:
    """Windows of seq_len slots of a line, wherever documents end; the last one is shorter."""

    def __init__(self, line: Line, seq_len: int) -> None:
        self.line, self._seq_len = line, seq_len
        self.slots = line.slots
        self.count = -(-line.slots // seq_len)

    def window(self, number: int) -> list[Run]:
        return self.line.runs(self.first_slot(number), self.first_slot(number + 1))

    def first_slot(self, number: int) -> int:
        return min(number * self._seq_len, self.slots)

    def fill(self, number: int) -> int:
        return self.first_slot(number + 1) - self.first_slot(number)

    def fills(self, numbers: Int64) -> int:
        short = int(np.count_nonzero(numbers == self.count - 1))
        return len(numbers) * self._seq_len - short * (self.count * self._seq_len - self.slots)

    def pieces(self, numbers: Int64) -> Pieces | None:
        if isinstance(self.line, Stream):
            return self.line.order.pieces(numbers * self._seq_len, self._seq_len)
        return None
