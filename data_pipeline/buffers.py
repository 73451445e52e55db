"""Memory for batches that is used again once nobody holds a batch in it.

Fresh memory of a step's size comes from the kernel page by page, which costs more time than filling it. So the arrays
of earlier steps are kept and given out again; that nobody uses one any more is seen in Python's own reference count,
which tensors made from an array, and all views of them, keep up.
"""

from __future__ import annotations

import sys
import threading

import numpy as np

from data_pipeline.order import Int64


class Buffers:
    """Groups of `arrays` int64 arrays of one shape; as many as were ever in use at a time, `most` at most, are kept."""

    def __init__(self, shape: tuple[int, int], *, arrays: int, most: int) -> None:
        self._shape, self._arrays, self._most = shape, arrays, most
        self._kept: list[tuple[Int64, ...]] = []
        self._lock = threading.Lock()
        self._unused = _references((np.empty(0, np.int64),))  # what is counted of an array that is only kept

    def take(self) -> list[Int64]:
        """`arrays` arrays, whatever stands in them, that nobody else has until the last view of them is gone."""
        with self._lock:
            for kept in self._kept:
                if _references(kept) == self._unused:
                    return [array.view() for array in kept]  # a view counts as a use of its array
            made = tuple(np.empty(self._shape, np.int64) for _ in range(self._arrays))
            if len(self._kept) < self._most:
                self._kept.append(made)
            return [array.view() for array in made]


def _references(arrays: tuple[Int64, ...]) -> int:
    """The most that is counted of one of them."""
    return max(sys.getrefcount(array) for array in arrays)
