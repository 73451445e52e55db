"""Hoffmann et al.'s third approach, for every law of fit_forms: the fit, its intervals, its error on runs it never saw.

Intervals are percentiles over a bootstrap of the runs (pairs, as Besiroglu et al. 2404.10102 have it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fit_forms import Form, law, optimum
from fit_optimise import Array, Objective, best_of_grid, refit, resamples, reweighted
from fit_table import EQUAL_FLOPS, Points, clusters

from sisa_dist.config import UserError

INTERVAL = (2.5, 97.5)
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class HeldOut:
    """Runs that were predicted and not fitted: relative errors (predicted / measured − 1) by run."""

    rule: str
    runs: tuple[str, ...]
    errors: Array

    @property
    def mean(self) -> float:
        return float(np.abs(self.errors).mean())

    def described(self) -> dict[str, Any]:
        each = [{"run": run, "error": float(error)} for run, error in zip(self.runs, self.errors, strict=True)]
        return {"rule": self.rule, "points": len(self.runs), "mean": self.mean, "each": each}


@dataclass(frozen=True)
class Fit:
    """A fitted law. theta [P], draws [B, P] (B may be 0)."""

    form: Form
    points: Points
    centre: Array
    theta: Array
    value: float
    draws: Array
    starts: int
    held_out: HeldOut | None = field(default=None)

    def loss(self, parameters: Array, tokens: Array) -> Array:
        return self.form.loss(self.theta[None], self.centre, parameters, tokens)[0]

    def loss_draws(self, parameters: Array, tokens: Array) -> Array:
        """[B, n]."""
        return self.form.loss(self.draws, self.centre, parameters, tokens)


def fit_form(form: Form, points: Points, *, squares: bool | None, draws: int, seed: int) -> Fit:
    """Raises UserError where the points cannot tell the law's parameters apart."""
    _enough(form, points)
    x = points.log()
    centre = x.mean(0)
    by = form.squares if squares is None else squares
    objective = Objective(form.predict, x - centre, np.log(points.loss), squares=by)
    grid = form.grid(centre, float(np.log(points.loss).mean()))
    theta, ends = best_of_grid(objective, grid)
    drawn = np.zeros((0, len(theta)))
    if draws:
        weights = resamples(len(points), draws, seed)
        # A resample needs as many different runs as the law has parameters; of few runs many have fewer.
        weights = weights[(weights > 0).sum(1) > len(theta)]
        drawn, _ = refit(reweighted(objective, weights), ends[:2], len(weights))
    return Fit(form, points, centre, theta, objective.value(theta), drawn, len(grid))


def extrapolation(fit: Fit, points: Points, rule: str) -> HeldOut:
    """Of a fit that has not seen `points`."""
    return HeldOut(rule, points.run, fit.loss(points.parameters, points.tokens) / points.loss - 1)


def hold_out_largest(fit: Fit, *, squares: bool | None) -> HeldOut | None:
    """The law fitted without the fifth of the runs with the most FLOPs, on those. None where too few would be left."""
    mask = without_largest(fit.points)
    try:
        smaller = fit_form(fit.form, fit.points[mask], squares=squares, draws=0, seed=0)
    except UserError:
        return None
    return extrapolation(smaller, fit.points[~mask], rule_of(mask))


def without_largest(points: Points) -> Array:
    """True for the runs to fit when those with the most FLOPs are held out, [n].

    An IsoFLOP slice is held out whole.
    """
    order = np.argsort(points.flops, kind="stable")
    edge = order[len(order) - max(1, round(HELD_OUT_SHARE * len(order)))]
    number = clusters(points.flops, EQUAL_FLOPS)
    return number < number[edge]


def rule_of(mask: Array) -> str:
    return f"the {(~mask).sum()} runs with the most FLOPs, from the {mask.sum()} others"


def describe(fit: Fit, budgets: list[float], factor: float) -> dict[str, Any]:
    """The entry of a law in the JSON: see fit_scaling_law.py."""
    theta = fit.theta[None]
    named = {name: float(value[0]) for name, value in fit.form.natural(theta, fit.centre).items()}
    drawn = fit.form.natural(fit.draws, fit.centre)
    coefficient, exponent = law(fit.form, theta, fit.centre, factor)
    exponents = law(fit.form, fit.draws, fit.centre, factor)[1]
    entry = {
        "form": fit.form.name,
        "source": fit.form.source,
        "parameters": {name: named[name] for name in fit.form.parameters},
        "intervals": {name: interval(drawn[name]) for name in fit.form.parameters},
        "objective": fit.value,
        "points": len(fit.points),
        "starts": fit.starts,
        "draws": len(fit.draws),
        "held_out_error": fit.held_out.mean if fit.held_out else None,
        "held_out": fit.held_out.described() if fit.held_out else None,
        "law": power_law(float(coefficient[0]), float(exponent[0]), interval(exponents), factor),
    }
    entry["optimum"] = [_optimum(fit, flops, factor) for flops in budgets]
    return entry


def power_law(coefficient: float, exponent: float, bounds: list[float] | None, factor: float) -> dict[str, Any]:
    """N* = N_coefficient·C^N_exponent and D* = D_coefficient·C^D_exponent, with C = factor·N·D."""
    mirrored = None if bounds is None else [1 - bounds[1], 1 - bounds[0]]
    return {
        "N_coefficient": coefficient,
        "N_exponent": exponent,
        "N_exponent_interval": bounds,
        "D_coefficient": 1 / (factor * coefficient),
        "D_exponent": 1 - exponent,
        "D_exponent_interval": mirrored,
    }


def interval(draws: Array) -> list[float] | None:
    """95 %, over the draws that have the value; None where fewer than half of them (or of 20) have."""
    have = draws[np.isfinite(draws)]
    if len(have) < max(10, len(draws) / 2):
        return None
    low, high = np.percentile(have, INTERVAL)
    return [float(low), float(high)]


def _optimum(fit: Fit, flops: float, factor: float) -> dict[str, Any]:
    best = optimum(fit.form, fit.theta[None], fit.centre, flops, factor)
    drawn = optimum(fit.form, fit.draws, fit.centre, flops, factor)
    names = ("parameters", "tokens", "loss")
    entry: dict[str, Any] = {"flops": flops}
    entry |= {name: float(value[0]) for name, value in zip(names, best, strict=True)}
    entry["intervals"] = {name: interval(value) for name, value in zip(names, drawn, strict=True)}
    return entry


def _enough(form: Form, points: Points) -> None:
    unknowns = len(form.parameters)
    if len(points) <= unknowns:
        raise UserError(f"{form.name} has {unknowns} unknowns and there are {len(points)} runs: it needs more of them")
    for values, what in ((points.parameters, "model sizes"), (points.tokens, "token budgets")):
        found = int(clusters(values).max()) + 1
        if found < 3:
            raise UserError(f"{form.name} needs at least 3 {what}, and there are {found}")
