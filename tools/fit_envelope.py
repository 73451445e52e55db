"""Hoffmann et al.'s first approach (2203.15556, §3.1): at each number of FLOPs the run whose training curve is lowest.

They draw a line through the best size at all 1 500 places. With a sweep's few sizes that is a staircase whose ends
have no rival, and its slope is too small (0.42 in place of 0.52 on nine sizes of a known law). The line here goes
through the places where the lowest run changes: there the best size lies between the two, at their geometric mean.
The approach compares runs before their learning rate has decayed, where the loss is still too high.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from fit_isoflop import describe_line
from fit_optimise import Array
from fit_table import Points, clusters

from sisa_dist.config import UserError
from sisa_dist.training.metrics_file import smooth

PLACES = 1500  # FLOPs looked at, evenly in their logarithm: as many as there


@dataclass(frozen=True)
class Envelope:
    """flops and N where the lowest curve changes, both [m]; draws [B, 2] of log coefficient and exponent."""

    flops: Array
    parameters: Array
    coefficient: float
    exponent: float
    draws: Array
    factor: float
    runs: int


def fit_envelope(points: Points, curves: dict[str, Array], *, draws: int, seed: int, factor: float) -> Envelope:
    """Raises UserError where fewer than three sizes are ever the best."""
    runs = [i for i, name in enumerate(points.run) if len(curves.get(name, ())) > 1]
    if len(runs) < 3:
        raise UserError(f"the minimum over training curves needs the curves of 3 runs, and there are {len(runs)}")
    sizes = np.log(points.parameters[runs])
    alike = clusters(points.parameters[runs])
    sizes = np.array([sizes[alike == i].mean() for i in alike])  # a change between equal sizes is none
    places, loss = _table([curves[points.run[i]] for i in runs])
    found = _lowest(places, loss, sizes)
    if found is None:
        raise UserError("the minimum over training curves: fewer than 3 sizes are ever lowest: add sizes or tokens")
    flops, n, line = found
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):  # runs are drawn, with their whole curves
        chosen = np.unique(generator.integers(0, len(runs), len(runs)))
        again = _lowest(places, loss[chosen], sizes[chosen])
        drawn.append([np.nan, np.nan] if again is None else again[2])
    kept = np.array(drawn).reshape(-1, 2)
    return Envelope(np.exp(flops), np.exp(n), float(np.exp(line[0])), float(line[1]), kept, factor, len(runs))


def describe_envelope(found: Envelope, budgets: list[float]) -> dict[str, Any]:
    entry = describe_line("envelope", found.coefficient, found.exponent, found.draws, budgets, found.factor)
    entry["source"] = "minimum over training curves (Hoffmann et al. 2203.15556, §3.1)"
    entry["points"] = found.runs
    return entry


def _table(curves: list[Array]) -> tuple[Array, Array]:
    """log FLOPs [m] and each curve's smoothed loss there [runs, m], inf where it has none."""
    ends = np.log([[curve[0, 0], curve[-1, 0]] for curve in curves])
    # Between the second to begin and the second to last to end: elsewhere one run has no rival.
    places = np.linspace(np.sort(ends[:, 0])[1], np.sort(ends[:, 1])[-2], PLACES)
    loss = np.full((len(curves), PLACES), np.inf)
    for row, curve in enumerate(curves):
        have = (places >= ends[row, 0]) & (places <= ends[row, 1])
        loss[row, have] = np.interp(places[have], np.log(curve[:, 0]), smooth(curve[:, 1]))
    return places, loss


def _lowest(places: Array, loss: Array, sizes: Array) -> tuple[Array, Array, Array] | None:
    """log FLOPs and log N where the winner changes, and intercept and slope of the line through them."""
    rivals = np.isfinite(loss).sum(0) >= 2
    if not rivals.any():
        return None
    flops, n = places[rivals], sizes[np.argmin(loss[:, rivals], axis=0)]
    if len(np.unique(n)) < 3:
        return None
    change = np.flatnonzero(np.diff(n))
    flops, n = (flops[change] + flops[change + 1]) / 2, (n[change] + n[change + 1]) / 2
    slope, intercept = np.polyfit(flops, n, 1)
    return flops, n, np.array([intercept, slope])
