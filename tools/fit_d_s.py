"""Has the loss a best d_s, and does it grow with the model? The joint law L(N, D, d_s), chosen among three.

    none      log L = log(E + A/N^alpha + B/D^beta)                          d_s makes no difference that can be told
    constant  … + k·(log d_s − log d_s*)²                                    one best d_s for every size
    power     … + k·(log d_s − log d_s*(N))²,  d_s*(N) = coefficient·N^exponent

k ≥ 0: what an unfit d_s costs, as a share of the loss. The law is chosen by held-out error: each size in turn is left
out and predicted from the others. The simplest law wins unless a richer one is better by more than the standard error
of the difference. The SISA paper found its best d_s at 16, 32 or 64 with no order in it, so "no law" is an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from fit_forms import OVER_TRAINING, predict_chinchilla
from fit_optimise import Array, Objective, best_of_grid, refit, reweighted
from fit_parametric import interval
from fit_table import Points, clusters

from sisa_dist.config import UserError

LAWS = ("none", "constant", "power")
SURE = 1.0  # standard errors of the difference by which a richer law has to be better


@dataclass(frozen=True)
class DsLaw:
    """theta [P] of every law and draws [B, P] of those with a best d_s, by name. errors: mean held-out error.

    sizes [m]: the model sizes; tried: the smallest and the largest d_s.
    """

    points: Points
    centre: Array  # of log N, log D, log d_s
    theta: dict[str, Array]
    draws: dict[str, Array]
    errors: dict[str, float]
    gains: dict[str, tuple[float, float]]
    chosen: str
    sizes: Array
    tried: tuple[float, float]

    def best(self, law: str, parameters: Array) -> tuple[Array, Array]:
        """d_s*(N) [m] and its draws [B, m] under constant or power."""
        x = np.log(parameters) - self.centre[0]
        found = [_log_best(theta, x) + self.centre[2] for theta in (self.theta[law][None], self.draws[law])]
        return np.exp(found[0][0]), np.exp(found[1])

    def loss(self, law: str, parameters: Array, tokens: Array, d_s: Array) -> Array:
        x = np.log(np.stack([parameters, tokens, d_s], 1)) - self.centre
        return np.exp(_PREDICT[law](self.theta[law][None], x)[0][0])


def predict_d_s(theta: Array, x: Array) -> tuple[Array, Array]:
    """θ = (a, b, e, α, β, log k, s) or (…, s, t) with log d_s* = s + t·log N; x [n, 3] -> [S, n], [S, P, n]."""
    total, slope = predict_chinchilla(theta[:, :5], x[:, :2])
    n, z = x[:, 0], x[:, 2]
    away = z - _log_best(theta, n)
    cost = np.exp(theta[:, 5:6])
    by = [cost * away**2, -2 * cost * away]
    if theta.shape[1] == 8:
        by.append(-2 * cost * away * n)
    return total + by[0], np.concatenate([slope, np.stack(by, 1)], 1)


def _predict_none(theta: Array, x: Array) -> tuple[Array, Array]:
    return predict_chinchilla(theta, x[:, :2])


_PREDICT = {"none": _predict_none, "constant": predict_d_s, "power": predict_d_s}


def fit_d_s(points: Points, *, draws: int, seed: int) -> DsLaw:
    """Raises UserError where sizes, d_s or runs are too few to tell the laws apart."""
    points = points[np.isfinite(points.d_s)]
    sizes, tried = clusters(points.parameters), np.unique(points.d_s)
    several = [
        size for size in np.unique(sizes) if len(np.unique(points.d_s[sizes == size])) > 1
    ]  # others tell nothing
    for found, what in ((len(several), "model sizes of several d_s"), (len(tried), "values of d_s")):
        if found < 3:
            raise UserError(f"the law of d_s needs at least 3 {what}, and there are {found}")
    if len(points) < 12:
        raise UserError(f"the law of d_s has 8 unknowns and needs at least 12 runs, and there are {len(points)}")
    x = np.concatenate([points.log(), np.log(points.d_s)[:, None]], 1)
    centre = x.mean(0)
    objectives = {law: Objective(_PREDICT[law], x - centre, np.log(points.loss)) for law in LAWS}
    # The 108 starts of the law with one exponent: of Chinchilla's 4 500 most lie far from any loss.
    starts = OVER_TRAINING.grid(centre[:2], float(np.log(points.loss).mean()))[:, [0, 1, 2, 3, 3]]
    base, _ = best_of_grid(objectives["none"], starts)
    ends = {"none": base[None]}
    ends["constant"] = best_of_grid(objectives["constant"], _starts(base, x[:, 2] - centre[2]))[1]
    richer = np.concatenate([ends["constant"], np.zeros((len(ends["constant"]), 1))], 1)
    tilted = [row + np.eye(8)[7] * tilt for row in richer for tilt in (-0.5, 0.0, 0.5)]
    ends["power"] = best_of_grid(objectives["power"], np.array(tilted))[1]
    errors, gains, chosen = _choose(objectives, ends, points, sizes)
    theta = {law: found[0] for law, found in ends.items()}
    drawn = {law: _draws(objectives[law], ends[law], draws, seed) for law in LAWS[1:]}
    middle = np.exp([np.log(points.parameters[sizes == size]).mean() for size in np.unique(sizes)])
    return DsLaw(points, centre, theta, drawn, errors, gains, chosen, middle, (float(tried[0]), float(tried[-1])))


def describe_d_s(found: DsLaw) -> dict[str, Any]:
    """The `d_s` entry of the JSON: see fit_scaling_law.py."""
    entry: dict[str, Any] = {
        "chosen": found.chosen,
        "verdict": verdict(found),
        "points": len(found.points),
        "tried": list(found.tried),
        "held_out_error": found.errors,
        "gain": {law: {"mean": gain, "standard_error": error} for law, (gain, error) in found.gains.items()},
        "laws": {},
        "optimum": [],
    }
    for law in ("constant", "power"):
        value, drawn = _described(found, found.theta[law][None]), _described(found, found.draws[law])
        entry["laws"][law] = {
            "parameters": {name: float(values[0]) for name, values in value.items()},
            "intervals": {name: interval(values) for name, values in drawn.items()},
        }
    if found.chosen != "none":
        value, drawn = found.best(found.chosen, found.sizes)
        for i, size in enumerate(found.sizes):
            inside = found.tried[0] <= value[i] <= found.tried[1]
            best = {"parameters": float(size), "d_s": float(value[i]), "interval": interval(drawn[:, i])}
            entry["optimum"].append(best | {"inside": bool(inside)})
    return entry


def verdict(found: DsLaw) -> str:
    """One sentence."""
    if found.chosen == "none":
        return "no law fits better than a constant: d_s makes no difference to the loss that these runs can tell"
    value, drawn = found.best(found.chosen, found.sizes)
    outside = " (outside the values tried)" if not _within(value, found.tried) else ""
    if found.chosen == "constant":
        return f"no law d_s*(N) fits better than a constant: d_s* = {value[0]:.3g}{_bounds(drawn[:, 0])}{outside}"
    exponent = found.theta["power"][7]
    return (
        f"d_s* = {value[0]:.3g} at N = {found.sizes[0]:.3g} to {value[-1]:.3g} at {found.sizes[-1]:.3g}: "
        f"proportional to N^{exponent:.3g}{_bounds(found.draws['power'][:, 7])}{outside}"
    )


def _described(found: DsLaw, theta: Array) -> dict[str, Array]:
    """k, coefficient and exponent of d_s* = coefficient·N^exponent, each [S]."""
    exponent = theta[:, 7] if theta.shape[1] == 8 else np.zeros(len(theta))
    scale = theta[:, 6] + found.centre[2] - exponent * found.centre[0]
    with np.errstate(over="ignore"):  # a draw without a best d_s may put it anywhere
        return {"k": np.exp(theta[:, 5]), "coefficient": np.exp(scale), "exponent": exponent}


def _within(value: Array, tried: tuple[float, float]) -> bool:
    return bool(((value >= tried[0]) & (value <= tried[1])).all())


def _bounds(draws: Array) -> str:
    found = interval(draws)
    return "" if found is None else f" [{found[0]:.3g}, {found[1]:.3g}]"


def _log_best(theta: Array, n: Array) -> Array:
    """Centred log d_s* [S, n]."""
    slope = theta[:, 7:8] if theta.shape[1] == 8 else 0.0
    return theta[:, 6:7] + slope * n


def _starts(base: Array, z: Array) -> Array:
    """Of the constant law: small and large costs, the best d_s at either end, in the middle and outside."""
    middle, half = (z.max() + z.min()) / 2, (z.max() - z.min()) / 2
    places = middle + half * np.array([-2, -1, -0.5, 0, 0.5, 1, 2])
    return np.array([[*base, cost, place] for cost in np.log([1e-4, 1e-3, 1e-2, 0.1]) for place in places])


def _choose(
    objectives: dict[str, Objective], ends: dict[str, Array], points: Points, sizes: Array
) -> tuple[dict[str, float], dict[str, tuple[float, float]], str]:
    """Held-out errors, each law's gain over the simpler one chosen so far with its standard error, and the choice.

    Errors are absolute, of log loss, as the fit counts them: squared, one run that went wrong would decide.
    """
    kept = np.stack([(sizes != size).astype(np.float64) for size in np.unique(sizes)])
    missed = {}
    for law in LAWS:
        objective = objectives[law]
        theta, _ = refit(reweighted(objective, kept), ends[law], len(kept))
        error = objective.y - objective.predict(theta, objective.x)[0][sizes, np.arange(len(points))]
        missed[law] = np.abs(_within_cells(error, sizes, points))
    chosen, gains = "none", {}
    for law in LAWS[1:]:
        gain = missed[chosen] - missed[law]
        standard = float(gain.std(ddof=1) / np.sqrt(len(gain)))
        gains[law] = (float(gain.mean()), standard)
        if gain.mean() > SURE * standard:
            chosen = law
    return {law: float(value.mean()) for law, value in missed.items()}, gains, chosen


def _within_cells(error: Array, sizes: Array, points: Points) -> Array:
    """Errors less their median over the runs of one size and token budget, where most such cells hold several runs.

    What a law of N and D gets wrong about a size it has not seen is the same for every d_s, and would drown the rest.
    """
    cell = sizes * (len(points) + 1) + clusters(points.tokens)
    _, which, count = np.unique(cell, return_inverse=True, return_counts=True)
    if (count[which] > 1).mean() < 0.5:
        return error
    middle = np.array([np.median(error[which == i]) for i in range(len(count))])
    centred = error - middle[which]
    return centred[count[which] > 1]


def _draws(objective: Objective, ends: Array, draws: int, seed: int) -> Array:
    """Residuals are drawn, not runs: a designed grid has one run a cell, and a resample would lack some of its d_s."""
    theta = ends[0]
    if not draws:
        return np.zeros((0, len(theta)))
    predicted = objective.predict(theta[None], objective.x)[0][0]
    residual = objective.y - predicted
    # The loss is nearly Σ|error|, whose minimum passes through as many runs as there are unknowns: those errors of
    # nothing say nothing of the noise, and drawn with the rest they make the intervals too narrow.
    residual = residual[np.argsort(np.abs(residual))[len(theta) :]]
    drawn = np.random.default_rng(seed).choice(residual, size=(draws, len(predicted)))
    again = Objective(objective.predict, objective.x, predicted + drawn)
    return refit(again, ends[:2], draws)[0]
