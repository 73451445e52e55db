"""Hoffmann et al.'s second approach (2203.15556, §3.2): a parabola in log N through each slice of equal FLOPs, and the
power law through their lowest points.

Assumes no law of the loss; says nothing of a slice whose lowest point lies outside the sizes that were tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fit_optimise import Array
from fit_parametric import interval, power_law
from fit_table import EQUAL_FLOPS, Points, clusters

from sisa_dist.config import UserError


@dataclass(frozen=True)
class Slice:
    """flops: the runs' geometric mean. curve [3]: loss = Σ curve[i]·(log N − middle)^i. lowest: log N*, log N* of each
    draw [B] (nan where the parabola has no lowest point)."""

    flops: float
    points: Points
    middle: float
    curve: Array
    lowest: float
    draws: Array

    @property
    def inside(self) -> bool:
        n = np.log(self.points.parameters)
        return bool(np.isfinite(self.lowest) and n.min() <= self.lowest <= n.max())

    @property
    def loss(self) -> float:
        return float(np.polynomial.polynomial.polyval(self.lowest - self.middle, self.curve))


@dataclass(frozen=True)
class IsoFlop:
    slices: tuple[Slice, ...]
    coefficient: float
    exponent: float
    draws: Array  # [B, 2]: log coefficient, exponent
    factor: float = field(default=6.0)


def slices_of(points: Points) -> list[Points]:
    """Slices with at least 3 different sizes, by rising FLOPs."""
    number = clusters(points.flops, EQUAL_FLOPS)
    parts = [points[number == i] for i in range(number.max() + 1)]
    return [part for part in parts if clusters(part.parameters).max() >= 2]


def fit_isoflop(points: Points, *, draws: int, seed: int, factor: float) -> IsoFlop:
    """Raises UserError where fewer than two slices have their lowest point among the sizes tried."""
    parts = slices_of(points)
    if len(parts) < 2:
        raise UserError(f"IsoFLOP parabolas need 2 slices of 3 sizes at the same FLOPs, and there are {len(parts)}")
    generator = np.random.default_rng(seed)
    slices = tuple(_parabola(part, draws, generator) for part in parts)
    used = [part for part in slices if part.inside]
    if len(used) < 2:
        raise UserError(
            f"IsoFLOP parabolas: {len(used)} of {len(slices)} slices have their lowest point among the sizes that were "
            "tried, 2 are needed: add smaller and larger models at the same FLOPs"
        )
    flops = np.log([part.flops for part in used])
    line = _lines(flops, np.array([[part.lowest for part in used]]))[0]
    drawn = _lines(flops, np.stack([part.draws for part in used], 1)) if draws else np.zeros((0, 2))
    return IsoFlop(slices, float(np.exp(line[0])), float(line[1]), drawn, factor)


def describe_isoflop(found: IsoFlop, budgets: list[float]) -> dict[str, Any]:
    entry = describe_line("isoflop", found.coefficient, found.exponent, found.draws, budgets, found.factor)
    entry["source"] = "parabolas in log N at equal FLOPs (Hoffmann et al. 2203.15556, §3.2)"
    entry["points"] = sum(len(part.points) for part in found.slices)
    used = [part for part in found.slices if part.inside]
    if len(used) > 2:
        # The slice with the most FLOPs, from the others.
        line = _lines(np.log([s.flops for s in used[:-1]]), np.array([[s.lowest for s in used[:-1]]]))[0]
        error = float(np.expm1(line[0] + line[1] * np.log(used[-1].flops) - used[-1].lowest))
        rule = "N* of the slice with the most FLOPs, from the others"
        entry |= {"held_out_error": abs(error), "held_out": {"rule": rule, "points": 1, "mean": abs(error)}}
    entry["slices"] = [
        {
            "flops": part.flops,
            "points": len(part.points),
            "parameters": float(np.exp(part.lowest)) if part.inside else None,
            "interval": interval(np.exp(part.draws)) if part.inside else None,
            "loss": part.loss if part.inside else None,
            "inside": part.inside,
        }
        for part in found.slices
    ]
    return entry


def describe_line(
    name: str, coefficient: float, exponent: float, draws: Array, budgets: list[float], factor: float
) -> dict[str, Any]:
    """What approaches 1 and 2 have in common: a power law of N* and no law of the loss."""
    bounds = interval(draws[:, 1])
    optimum = []
    for flops in budgets:
        parameters, drawn = coefficient * flops**exponent, np.exp(draws[:, 0] + draws[:, 1] * np.log(flops))
        intervals = {"parameters": interval(drawn), "tokens": interval(flops / (factor * drawn)), "loss": None}
        best = {"flops": flops, "parameters": parameters, "tokens": flops / (factor * parameters), "loss": None}
        optimum.append(best | {"intervals": intervals})
    return {
        "form": name,
        "parameters": {"N_coefficient": coefficient, "N_exponent": exponent},
        "intervals": {"N_coefficient": interval(np.exp(draws[:, 0])), "N_exponent": bounds},
        "objective": None,
        "draws": len(draws),
        "held_out_error": None,
        "held_out": None,
        "law": power_law(coefficient, exponent, bounds, factor),
        "optimum": optimum,
    }


def _parabola(points: Points, draws: int, generator: np.random.Generator) -> Slice:
    """Draws: residuals are drawn anew, since a slice has too few runs to leave some out. A parabola through every run
    has none, and what else it could be is not known: nan."""
    n = np.log(points.parameters)
    middle = float(n.mean())
    powers = np.stack([np.ones_like(n), n - middle, (n - middle) ** 2], 1)
    solve = np.linalg.pinv(powers)
    curve = solve @ points.loss
    residual = points.loss - powers @ curve
    free = len(n) - 3
    spread = residual * np.sqrt(len(n) / free) if free > 0 else np.full(len(n), np.nan)
    drawn = generator.choice(spread, size=(draws, len(n)))
    curves = (powers @ curve + drawn) @ solve.T
    flops = float(np.exp(np.log(points.flops).mean()))
    return Slice(flops, points, middle, curve, float(_lowest(curve[None], middle)[0]), _lowest(curves, middle))


def _lowest(curves: Array, middle: float) -> Array:
    with np.errstate(all="ignore"):
        return np.where(curves[:, 2] > 0, middle - curves[:, 1] / (2 * curves[:, 2]), np.nan)


def _lines(x: Array, y: Array) -> Array:
    """Least squares of each row of y [B, n] on x [n]; nan are left out -> [B, 2] intercept, slope."""
    have = np.isfinite(y)
    weight = have / np.maximum(have.sum(1, keepdims=True), 1)
    value = np.where(have, y, 0.0)
    x_mean, y_mean = weight @ x, (weight * value).sum(1)
    away = x - x_mean[:, None]
    with np.errstate(all="ignore"):
        slope = (weight * away * (value - y_mean[:, None])).sum(1) / (weight * away**2).sum(1)
    return np.stack([y_mean - slope * x_mean, slope], 1)
