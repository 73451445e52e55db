"""95 % intervals for what a few runs found on a common set of items.

Seeds and items are crossed: every run answers the same items. So both are drawn anew with replacement, items once for
all runs of a draw (Owen 2007, "The pigeonhole bootstrap"). With three seeds the seeds' part of it is coarse, and such
intervals are known to be too narrow rather than too wide; nothing here can mend that but more seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def interval(
    values: Sequence[Sequence[float]] | NDArray[np.float64],
    weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of the mean of values[run][item], items weighted alike or by `weights`: percentiles of `draws` means.

    Every run has the same items in the same order.
    """
    values_SN = np.asarray(values, dtype=np.float64)
    assert values_SN.ndim == 2 and values_SN.size, "runs of equally many items"
    runs, items = values_SN.shape
    weights_N = np.ones(items) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng(seed)
    runs_DS = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs
    means = np.empty(draws)
    for draw in range(draws):  # one at a time: of many items all draws at once would not fit the memory
        counts_N = np.bincount(rng.integers(items, size=items), minlength=items) * weights_N
        means[draw] = runs_DS[draw] @ (values_SN @ counts_N) / counts_N.sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
