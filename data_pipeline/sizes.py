"""The sizes that `sisa prepare` works in. The defaults suit a laptop and a terabyte; tests make them small.

Slices and partitions decide the order of documents and where members are cut: they are part of what the result depends
on, and are chosen from the input alone, never from how many workers there are.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Bytes, where nothing else is said."""

    smallest_slice: int = 4_000_000  # of input
    largest_slice: int = 128_000_000
    slices: int = 256  # of a corpus between those two
    partition: int = 64_000_000  # of text, about
    partitions: int = 4096  # at most; beyond that they grow
    buffer: int = 64_000_000  # ids a slice holds before it writes a run
    group: int = 128_000_000  # ids of a partition held at once
    processes: int = 48_000_000  # of text: with less, starting processes costs more than it saves

    def slice(self, input_bytes: int) -> int:
        return min(self.largest_slice, max(self.smallest_slice, input_bytes // self.slices))

    def num_partitions(self, text_bytes: int) -> int:
        return min(self.partitions, max(1, -(-text_bytes // self.partition)))


USUAL = Sizes()
