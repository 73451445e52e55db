"""A hash table of 64-bit keys in little memory: 16 bytes a slot, where a Python dict takes above 100 an entry.

Open addressing with linear probing, at most two thirds full, doubled when it is: 24 to 48 bytes an entry, and during a
doubling half as much again. Up to `memory_bytes` it lies in memory, beyond that in a file, of which the system keeps in
memory what it can spare. Keys must be hashes already. A key may be added again: all its values are found.
"""

from __future__ import annotations

import mmap
from pathlib import Path


class Table:
    def __init__(self, *, memory_bytes: int, file: Path, slots: int = 1 << 12) -> None:
        """`slots`: a power of two. `file` is made only where the table outgrows `memory_bytes`."""
        assert slots & (slots - 1) == 0
        self._memory_bytes, self._file = memory_bytes, file
        self.entries = 0
        self._allocate(slots)

    def find(self, key: int) -> list[int]:
        """The values of `key`, in the order they were added."""
        cells, mask = self._cells, self._mask
        slot, found = key & mask, []
        while (held := cells[2 * slot + 1]) != 0:
            if cells[2 * slot] == key:
                found.append(held - 1)
            slot = (slot + 1) & mask
        return found

    def add(self, key: int, value: int) -> None:
        """key, value: 0 ≤ key < 2^64, 0 ≤ value < 2^64 - 1."""
        if 3 * (self.entries + 1) > 2 * (self._mask + 1):
            self._grow()
        self._put(key, value + 1)
        self.entries += 1

    def close(self) -> None:
        self._cells.release()
        self._map.close()

    def _put(self, key: int, held: int) -> None:
        cells, mask = self._cells, self._mask
        slot = key & mask
        while cells[2 * slot + 1] != 0:
            slot = (slot + 1) & mask
        cells[2 * slot], cells[2 * slot + 1] = key, held

    def _grow(self) -> None:
        old, cells, slots = self._map, self._cells, self._mask + 1
        self._allocate(2 * slots)
        # A run of full slots may go over the end: begun at an empty one, a key's values are moved in their order.
        first = next(slot for slot in range(slots) if cells[2 * slot + 1] == 0)
        for slot in range(first, first + slots):
            place = 2 * (slot & (slots - 1))
            if held := cells[place + 1]:
                self._put(cells[place], held)
        cells.release()
        old.close()

    def _allocate(self, slots: int) -> None:
        size = 16 * slots
        if size <= self._memory_bytes:
            self._map = mmap.mmap(-1, size)
        else:
            self._file.unlink(missing_ok=True)  # the smaller one lives on until it is closed
            with open(self._file, "w+b") as file:
                file.truncate(size)
                self._map = mmap.mmap(file.fileno(), size)
        self._cells, self._mask = memoryview(self._map).cast("Q"), slots - 1
