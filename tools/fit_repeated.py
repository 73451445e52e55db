"""The law for tokens seen more than once (Muennighoff et al. 2305.16264): what repetition and excess
parameters are still worth.

    L = E + A/N'^alpha + B/D'^beta
    D' = U_D + U_D·R_D*·(1 − e^(−R_D/R_D*)),  U_D = min(D, unique tokens),  R_D = D/U_D − 1
    N' = U_N + U_N·R_N*·(1 − e^(−R_N/R_N*)),  U_N = min(N, N_opt(U_D)),     R_N = N/U_N − 1

They fitted A, B, E, alpha, beta on the runs of a single pass and then R_D* and R_N* alone. Here that is the start, and
all seven are fitted to all runs: a single pass with N above N_opt has excess parameters too, so their first fit, which
knows of none, is off by as much as such runs weigh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from fit_forms import CHINCHILLA, predict_chinchilla
from fit_optimise import Array, Objective, best_of_grid, refit, resamples, reweighted
from fit_parametric import HeldOut, fit_form, interval, rule_of, without_largest
from fit_table import Points

from sisa_dist.config import UserError

NAMES = (*CHINCHILLA.parameters, "R_D", "R_N")
SOURCE = "Chinchilla's in effective parameters and tokens (Muennighoff et al. 2305.16264)"
_STARTS = np.log([0.5, 2.0, 8.0, 32.0, 128.0])


@dataclass(frozen=True)
class RepeatedFit:
    """theta [7]: Chinchilla's five (centred), log R_D*, log R_N*; draws [B, 7]."""

    points: Points
    centre: Array
    theta: Array
    value: float
    draws: Array
    held_out: HeldOut | None = None

    def loss(self, points: Points) -> Array:
        return np.exp(predict_repeated(self.theta[None], _inputs(points, self.centre))[0][0])


def predict_repeated(theta: Array, x: Array) -> tuple[Array, Array]:
    """θ [S, 7], x [n, 3] = centred log N, log D, log U_D -> log loss [S, n], derivatives [S, 7, n]."""
    a, b, _, alpha, beta, log_d, log_n = theta.T[:, :, None]
    n, d, unique = x.T
    with np.errstate(all="ignore"):
        # N_opt(U_D): the N for which U_D is the compute-optimal number of tokens (Hoffmann et al. eq. 4).
        best = (np.log(alpha) + a - np.log(beta) - b + beta * unique) / alpha
        moves = best < n  # nan, where there is no optimum, is False
        used = np.where(moves, best, n)
        tokens, its_d, _ = _worth(unique, d - unique, log_d)
        size, its_n, kept = _worth(used, n - used, log_n)
        # By a, b, α, β through N_opt.
        one = np.ones_like(best)
        through = np.stack([one, -one, one / alpha - best, unique - one / beta]) / alpha
        through = np.where(moves, kept * through, 0.0)
    total, inner = predict_chinchilla(theta[:, :5], np.stack([size, np.broadcast_to(tokens, size.shape)], 2))
    by_size, by_tokens = -alpha * inner[:, 0], -beta * inner[:, 1]
    inner[:, [0, 1, 3, 4]] += by_size[:, None] * through.transpose(1, 0, 2)
    return total, np.concatenate([inner, (by_tokens * its_d)[:, None], (by_size * its_n)[:, None]], 1)


def fit_repeated(points: Points, *, draws: int, seed: int) -> RepeatedFit:
    """Raises UserError where single passes or repetitions are missing."""
    if not np.isfinite(points.unique).any():
        raise UserError("the repeated form needs a column of unique tokens: name it with --unique-column")
    once = _passes(points) <= 1 + 1e-6
    if (~once).sum() < 3:
        raise UserError(f"the repeated form needs at least 3 runs that repeat tokens, and there are {(~once).sum()}")
    try:
        base = fit_form(CHINCHILLA, points[once], squares=None, draws=0, seed=seed)
    except UserError as error:
        raise UserError(f"the repeated form, of the {once.sum()} runs of a single pass: {error}") from None
    x, y = _inputs(points, base.centre), np.log(points.loss)
    objective = Objective(predict_repeated, x, y)
    grid = np.array([[*base.theta, first, second] for first in _STARTS for second in _STARTS])
    theta, ends = best_of_grid(objective, grid)
    drawn = np.zeros((0, 7))
    if draws:
        weights = resamples(len(points), draws, seed)
        weights = weights[((weights[:, once] > 0).sum(1) > 5) & ((weights[:, ~once] > 0).sum(1) > 2)]
        drawn, _ = refit(reweighted(objective, weights), ends[:2], len(weights))
    return RepeatedFit(points, base.centre, theta, objective.value(theta), drawn)


def hold_out_repeated(fit: RepeatedFit) -> HeldOut | None:
    """The law fitted without the fifth of the runs with the most FLOPs, on those. None where too few would be left."""
    mask = without_largest(fit.points)
    try:
        smaller = fit_repeated(fit.points[mask], draws=0, seed=0)
    except UserError:
        return None
    rest = fit.points[~mask]
    return HeldOut(rule_of(mask), rest.run, smaller.loss(rest) / rest.loss - 1)


def describe_repeated(fit: RepeatedFit, budgets: list[float], unique: float, factor: float) -> dict[str, Any]:
    named, drawn = _natural(fit.theta[None], fit.centre), _natural(fit.draws, fit.centre)
    return {
        "form": "repeated",
        "source": SOURCE,
        "parameters": {name: float(named[name][0]) for name in NAMES},
        "intervals": {name: interval(drawn[name]) for name in NAMES},
        "objective": fit.value,
        "points": len(fit.points),
        "draws": len(fit.draws),
        "held_out_error": fit.held_out.mean if fit.held_out else None,
        "held_out": fit.held_out.described() if fit.held_out else None,
        "law": None,  # with repetition the optimum is no power of the budget
        "unique_tokens": unique,
        "optimum": [_optimum(fit, flops, unique, factor) for flops in budgets],
    }


def _worth(unique: Array, excess: Array, log_scale: Array) -> tuple[Array, Array, Array]:
    """log of U + U·R*·(1 − e^(−R/R*)), for log U and log(1 + R), with two derivatives: by log R*, and by log U where
    U·(1 + R) stays as it is."""
    repeats, scale = np.expm1(np.minimum(excess, 50)), np.exp(log_scale)
    ratio = repeats / scale
    gain, fading = -scale * np.expm1(-ratio), np.exp(-ratio)
    by_scale = (gain - repeats * fading) / (1 + gain)
    return unique + np.log1p(gain), by_scale, 1 - fading * (1 + repeats) / (1 + gain)


def _passes(points: Points) -> Array:
    return points.tokens / np.minimum(points.tokens, np.where(np.isnan(points.unique), np.inf, points.unique))


def _inputs(points: Points, centre: Array) -> Array:
    unique = np.log(points.tokens / _passes(points)) - centre[1]
    return np.concatenate([points.log() - centre, unique[:, None]], 1)


def _natural(theta: Array, centre: Array) -> dict[str, Array]:
    return CHINCHILLA.natural(theta[:, :5], centre) | {"R_D": np.exp(theta[:, 5]), "R_N": np.exp(theta[:, 6])}


def _optimum(fit: RepeatedFit, flops: float, unique: float, factor: float) -> dict[str, Any]:
    """The least loss along N·D = flops/factor, on a grid of 2 % steps in N."""
    middle = fit.centre[0]
    n = middle + np.arange(np.log(1e-4), np.log(1e8), 0.02)
    tokens = np.log(flops / factor) - n
    used = np.minimum(tokens, np.log(unique))
    x = np.stack([n - middle, tokens - fit.centre[1], used - fit.centre[1]], 1)
    found = []
    for theta in (fit.theta[None], fit.draws):
        loss = predict_repeated(theta, x)[0]
        at = np.argmin(loss, axis=1)
        found.append((np.exp(n[at]), np.exp(tokens[at]), np.exp(loss[np.arange(len(theta)), at])))
    names = ("parameters", "tokens", "loss")
    entry: dict[str, Any] = {"flops": flops, "unique_tokens": unique}
    entry |= {name: float(value[0]) for name, value in zip(names, found[0], strict=True)}
    entry["intervals"] = {name: interval(value) for name, value in zip(names, found[1], strict=True)}
    return entry
