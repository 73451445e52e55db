"""Which source serves the i-th window of a mixture: error diffusion over a fixed period, so that every count is a sum.

A period of PERIOD windows holds a whole number of each source's, as near to its share as that allows; inside it every
source is kept as close to its share as one window at a time can. Any window's source, and how many of each source come
before it, follow from its number alone, at any number of data ranks. It knows names and shares, no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from data_pipeline.order import Int64
from sisa_dist.config import UserError

PERIOD = 1 << 14  # shares are rounded to 1/16 384; the table is 64 KB a source
MIXTURE_VERSION = 1  # in the loader's fingerprint: raise it with any change here that serves another order


class Mixture:
    """The sources by name, in the order they were given, with their windows in a period."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        """`shares` are normalised; 0 keeps a source without serving it. Raises UserError for one too small to count."""
        self.names = list(shares)
        self.per_period = dict(zip(self.names, _whole(list(shares.values())), strict=True))
        for name, share in shares.items():
            if share > 0 and self.per_period[name] == 0:
                total = sum(shares.values())
                raise UserError(
                    f"data.mixture.{name}: its share {share / total:.2g} is less than one window in {PERIOD}: raise "
                    f"its weight to {total / PERIOD:.2g} or more, or set it to 0"
                )
        self._pattern, self._before = _diffuse(tuple(self.per_period.values()))

    def source(self, window: int) -> tuple[str, int]:
        """The source of the mixture's window number `window`, and which of that source's own it is."""
        periods, place = divmod(window, PERIOD)
        number = int(self._pattern[place])
        name = self.names[number]
        return name, periods * self.per_period[name] + int(self._before[number, place])

    def served(self, windows: Int64) -> tuple[Int64, Int64]:
        """`source` of many at once: (number among `names`, which of that source's own), [n] both."""
        periods, places = np.divmod(windows, PERIOD)
        numbers = self._pattern[places]
        per_period = np.array(list(self.per_period.values()), np.int64)
        return numbers, periods * per_period[numbers] + self._before[numbers, places]

    def counts(self, windows: int) -> dict[str, int]:
        """How many of the mixture's first `windows` are each source's."""
        periods, place = divmod(windows, PERIOD)
        return {
            name: periods * self.per_period[name] + int(self._before[number, place])
            for number, name in enumerate(self.names)
        }


def _whole(shares: list[float]) -> list[int]:
    """Largest remainders: whole numbers that sum to PERIOD. Equal remainders: the first source."""
    exact = [share / sum(shares) * PERIOD for share in shares]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: PERIOD - sum(counts)]:
        counts[i] += 1
    return counts


@lru_cache(maxsize=8)
def _diffuse(counts: tuple[int, ...]) -> tuple[Int64, Int64]:
    """(source of each place [PERIOD], windows of each source before it [sources, PERIOD + 1]).

    Every place goes to the source that is furthest behind, in whole numbers: no rounding, on any machine. What a source
    is behind is always above −PERIOD and sums to 0 over a period, in which each has then had exactly its count.
    """
    behind = [0] * len(counts)
    pattern = np.empty(PERIOD, np.int64)
    for place in range(PERIOD):
        behind = [b + c for b, c in zip(behind, counts, strict=True)]
        chosen = max(range(len(counts)), key=behind.__getitem__)
        behind[chosen] -= PERIOD
        pattern[place] = chosen
    served = pattern == np.arange(len(counts))[:, None]
    before = np.zeros((len(counts), PERIOD + 1), np.int64)
    np.cumsum(served, axis=1, out=before[:, 1:])
    return pattern, before
