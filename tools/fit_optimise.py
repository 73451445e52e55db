"""Many small fits at once: the summed objective of a law and its minimum from a batch of starts.

Starts of a grid, resamples of a bootstrap and folds of a cross-validation are all rows of one batch, so that NumPy does
the work. The batch is minimised by BFGS: with at most eight unknowns its full matrix is smaller than what L-BFGS would
remember. The winner of a grid is finished by SciPy's L-BFGS-B. This file knows no law: `fit_forms.py` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize as scipy_minimize

Array = NDArray[np.float64]
# (θ [S, P], x [n, F]) -> log loss [S, n] and its derivatives [S, P, n]
Predict = Callable[[Array, Array], tuple[Array, Array]]
Function = Callable[[Array, NDArray[np.intp]], tuple[Array, Array]]

HUBER_DELTA = 1e-3  # Hoffmann et al. 2203.15556, §3.3
_ELEMENTS = 60_000  # starts × points worked on at once: what stays in a core's second-level cache


@dataclass(frozen=True)
class Objective:
    """Σ over points of Huber(1e-3) of the error of log loss, or of the squared error of the loss.

    The sum, not the mean: L-BFGS stops on absolute changes, and with the mean it stopped Hoffmann et al. too early
    (Besiroglu et al. 2404.10102). `y` is log loss, [n] or, one row a fit, [S, n]; `weights` likewise, or None.
    """

    predict: Predict
    x: Array
    y: Array
    weights: Array | None = None
    squares: bool = False

    def __call__(self, theta: Array, rows: NDArray[np.intp]) -> tuple[Array, Array]:
        """Values [R] and gradients [R, P] of the fits `rows` at theta [R, P]."""
        predicted, slope = self.predict(theta, self.x)
        y = self.y if self.y.ndim == 1 else self.y[rows]
        if self.squares:
            loss = np.exp(np.minimum(predicted, 300.0))  # a start may be anywhere
            error = loss - np.exp(y)
            each, pull = error**2, 2 * error * loss
        else:
            error = predicted - y
            size = np.abs(error)
            each = np.where(size <= HUBER_DELTA, 0.5 * error**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA))
            pull = np.clip(error, -HUBER_DELTA, HUBER_DELTA)
        if self.weights is not None:
            weights = self.weights if self.weights.ndim == 1 else self.weights[rows]
            each, pull = each * weights, pull * weights
        scale = 1.0 if self.squares else HUBER_DELTA**-2  # of order the points inside, as stopping rules expect
        return scale * each.sum(1), scale * np.matmul(slope, pull[:, :, None])[:, :, 0]

    def value(self, theta: Array) -> float:
        """The sum as the papers quote it, of one fit: theta [P]."""
        scaled = float(self(theta[None], np.zeros(1, np.intp))[0][0])
        return scaled if self.squares else scaled * HUBER_DELTA**2


def minimise(function: Function, start: Array, *, points: int, iterations: int = 200) -> tuple[Array, Array]:
    """θ [S, P] and values [S], each row from its own start [S, P]. `points`: a fit's, to cut the batch by."""
    size = max(8, _ELEMENTS // max(1, points))
    parts = [np.arange(i, min(i + size, len(start)), dtype=np.intp) for i in range(0, len(start), size)]
    with np.errstate(all="ignore"):
        found = [_bfgs(function, start[part], part, iterations) for part in parts]
    return np.concatenate([theta for theta, _ in found]), np.concatenate([value for _, value in found])


def best_of_grid(objective: Objective, grid: Array) -> tuple[Array, Array]:
    """The minimum [P] from every start of grid [S, P], and the best different ends [K, P], itself first.

    All starts take 12 steps, the best 400 of them 30 more, the best 24 go on to the end, and L-BFGS-B finishes the best
    three.
    """
    points, theta = objective.x.shape[0], grid
    for iterations, goes_on in ((12, 400), (30, 24), (400, 24)):
        theta, value = minimise(objective, theta, points=points, iterations=iterations)
        kept = np.argsort(np.where(np.isfinite(value), value, np.inf))[:goes_on]
        theta, value = theta[kept], value[kept]
    order = np.argsort(value)
    ends = [theta[i] for i in order]
    finished = [_finish(objective, end) for end in ends[:3]]
    best = min(finished, key=lambda found: found[1])[0]
    others = [best]
    for end in ends:
        if all(np.abs(end - other).max() > 0.05 for other in others):
            others.append(end)
    return best, np.stack(others[:4])


def refit(objective: Objective, starts: Array, fits: int) -> tuple[Array, Array]:
    """θ [fits, P] and values: every fit (a row of the objective's y or weights) from each of starts [K, P].

    The way a bootstrap and a cross-validation stay cheap: from the best fit and a few others, not from the grid.
    """
    ends, values = [], []
    for start in starts:
        theta, value = minimise(objective, np.tile(start, (fits, 1)), points=objective.x.shape[0], iterations=120)
        ends.append(theta)
        values.append(np.where(np.isfinite(value), value, np.inf))
    best = np.argmin(values, axis=0)
    return np.stack(ends)[best, np.arange(fits)], np.stack(values)[best, np.arange(fits)]


def reweighted(objective: Objective, weights: Array) -> Objective:
    return replace(objective, weights=weights)


def resamples(points: int, draws: int, seed: int) -> Array:
    """How often each of `points` is drawn, [draws, points]: a bootstrap over pairs, as weights."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(points, np.full(points, 1 / points), size=draws).astype(np.float64)


def _finish(objective: Objective, start: Array) -> tuple[Array, float]:
    row = np.zeros(1, np.intp)

    def function(theta: Array) -> tuple[float, Array]:
        value, gradient = objective(theta[None], row)
        return float(value[0]), gradient[0]

    theta, value = start, function(start)[0]
    for _ in range(5):  # each time afresh: its memory of a kink of the Huber loss misleads it
        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-16, "gtol": 1e-10}
        found = scipy_minimize(function, theta, jac=True, method="L-BFGS-B", options=options)
        if not found.fun < value:
            break
        gain, theta, value = value - found.fun, found.x, float(found.fun)
        if gain < 1e-12 * abs(value):
            break
    return theta, value


def _bfgs(function: Function, start: Array, rows: NDArray[np.intp], iterations: int) -> tuple[Array, Array]:
    """BFGS with a weak Wolfe line search: the one that also works on kinks (Lewis and Overton 2013, algorithm 2.6)."""
    theta = start.copy()
    value, gradient = function(theta, rows)
    identity = np.eye(theta.shape[1])
    inverse = np.tile(identity, (len(theta), 1, 1))
    idle = np.zeros(len(theta), np.int64)
    active = np.flatnonzero(np.isfinite(value))
    for _ in range(iterations):
        if not active.size:
            break
        direction = -np.einsum("spq,sq->sp", inverse[active], gradient[active])
        slope = (direction * gradient[active]).sum(1)
        lost = ~(slope < 0)
        inverse[active[lost]] = identity
        direction[lost] = -gradient[active[lost]]
        # No step of more than 2: a unit of θ is a factor of e in A, or all of an exponent.
        direction *= np.minimum(1, 2 / np.maximum(np.abs(direction).max(1), 1e-300))[:, None]
        new, new_value, new_gradient = _line_search(
            function, theta[active], value[active], gradient[active], direction, rows[active]
        )
        step, change = new - theta[active], new_gradient - gradient[active]
        _update(inverse, active, step, change)
        small = value[active] - new_value <= 1e-11 * np.abs(new_value)
        idle[active] = np.where(small, idle[active] + 1, 0)
        theta[active], value[active], gradient[active] = new, new_value, new_gradient
        inverse[active[small]] = identity  # it gets one more chance along the gradient
        active = active[(idle[active] < 3) & (np.abs(gradient[active]).max(1) > 1e-10)]
    return theta, value


def _update(inverse: Array, active: NDArray[np.intp], step: Array, change: Array) -> None:
    curvature = (step * change).sum(1)
    good = curvature > 1e-14 * np.linalg.norm(step, axis=1) * np.linalg.norm(change, axis=1)
    if not good.any():
        return
    rows, s, y, sy = active[good], step[good], change[good], curvature[good]
    old = inverse[rows]
    first = (old == np.eye(s.shape[1])).all((1, 2))
    old[first] *= (sy / (y * y).sum(1))[first, None, None]
    hy = np.einsum("spq,sq->sp", old, y)
    both = hy[:, :, None] * s[:, None, :]
    outer = s[:, :, None] * s[:, None, :]
    factor = ((sy + (y * hy).sum(1)) / sy**2)[:, None, None]
    inverse[rows] = old + factor * outer - (both + both.transpose(0, 2, 1)) / sy[:, None, None]


def _line_search(
    function: Function, theta: Array, value: Array, gradient: Array, direction: Array, rows: NDArray[np.intp]
) -> tuple[Array, Array, Array]:
    """New θ, values and gradients; a row for which no step descends stays where it is."""
    slope = (direction * gradient).sum(1)
    step, low, high = np.ones(len(theta)), np.zeros(len(theta)), np.full(len(theta), np.inf)
    new, new_value, new_gradient = theta.copy(), value.copy(), gradient.copy()
    pending = np.arange(len(theta))
    for _ in range(25):
        trial = theta[pending] + step[pending, None] * direction[pending]
        got, its = function(trial, rows[pending])
        lower = got <= value[pending] + 1e-4 * step[pending] * slope[pending]
        flat = (its * direction[pending]).sum(1) >= 0.9 * slope[pending]
        taken = pending[lower]
        new[taken], new_value[taken], new_gradient[taken] = trial[lower], got[lower], its[lower]
        high[pending[~lower]] = step[pending[~lower]]
        low[taken] = step[taken]
        pending = pending[~(lower & flat)]
        if not pending.size:
            break
        wide = np.isinf(high[pending])
        step[pending] = np.where(wide, 2 * step[pending], 0.5 * (low[pending] + high[pending]))
    return new, new_value, new_gradient
