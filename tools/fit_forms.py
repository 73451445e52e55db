"""The laws L(N, D) that are fitted: their prediction with its derivatives, their grid of starts, their optimum.

N: parameters, D: training tokens, C: FLOPs of training, C = k·N·D with k = 6 unless said otherwise. Every law is a sum
of powers inside a logarithm, so it is fitted as a log-sum-exp over log N and log D, both less their mean over the
points: without that the scale A and the exponent α are nearly one unknown. θ is always in those centred terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from fit_optimise import Array
from scipy.special import logsumexp

Named = dict[str, Array]


@dataclass(frozen=True)
class Form:
    """A law. `predict`: θ [S, P], x [n, 2] -> log loss [S, n], derivatives [S, P, n]. `grid`: centre [2], mean log
    loss -> starts [S, P]. `natural`: θ [S, P], centre -> the paper's parameters, each [S]. `powers`: the same ->
    (log A, α, log B, β), each [S], of the sum A/N^α + B/D^β whose minimum at fixed C is the law's.
    """

    name: str
    source: str
    parameters: tuple[str, ...]
    squares: bool  # its paper's objective: squared error of the loss, or Huber on log loss
    predict: Callable[[Array, Array], tuple[Array, Array]]
    grid: Callable[[Array, float], Array]
    natural: Callable[[Array, Array], Named]
    powers: Callable[[Array, Array], tuple[Array, Array, Array, Array]]

    def loss(self, theta: Array, centre: Array, parameters: Array, tokens: Array) -> Array:
        """[S, n]."""
        x = np.stack([np.log(parameters), np.log(tokens)], 1) - centre
        return np.exp(self.predict(theta, x)[0])


def softmax_sum(terms: Array) -> tuple[Array, Array]:
    """log Σ exp over axis 1 of terms [S, K, n], and each term's share of it."""
    total = logsumexp(terms, axis=1)
    return total, np.exp(terms - total[:, None])


def predict_chinchilla(theta: Array, x: Array) -> tuple[Array, Array]:
    """θ = (a, b, e, α, β): log L = LSE(a − α log N, b − β log D, e). x [n, 2], or [S, n, 2]: each row's own."""
    a, b, e, alpha, beta = theta.T[:, :, None]
    n, d = x[..., 0], x[..., 1]
    total, share = softmax_sum(np.stack([a - alpha * n, b - beta * d, np.broadcast_to(e, (len(e), n.shape[-1]))], 1))
    along = (slice(None), None) if n.ndim == 2 else ()
    return total, np.concatenate([share, -share[:, :1] * n[along], -share[:, 1:2] * d[along]], 1)


def _chinchilla_grid(centre: Array, mean: float) -> Array:
    """Hoffmann et al.'s 4 500 starts (2203.15556, appendix D)."""
    exponents, log_scales = np.arange(0, 2.5, 0.5), np.arange(0, 30, 5.0)
    starts = itertools.product(log_scales, log_scales, np.arange(-1, 1.5, 0.5), exponents, exponents)
    grid = np.array(list(starts))
    grid[:, :2] -= grid[:, 3:] * centre
    return grid


def _chinchilla_natural(theta: Array, centre: Array) -> Named:
    a, b, e, alpha, beta = theta.T
    scales = {"A": np.exp(a + alpha * centre[0]), "B": np.exp(b + beta * centre[1]), "E": np.exp(e)}
    return scales | {"alpha": alpha, "beta": beta}


def _chinchilla_powers(theta: Array, centre: Array) -> tuple[Array, Array, Array, Array]:
    a, b, _, alpha, beta = theta.T
    return a + alpha * centre[0], alpha, b + beta * centre[1], beta


def _predict_over_training(theta: Array, x: Array) -> tuple[Array, Array]:
    """θ = (a, b, e, 2η): Chinchilla's with one exponent."""
    total, slope = predict_chinchilla(theta[:, [0, 1, 2, 3, 3]], x)
    return total, np.concatenate([slope[:, :3], slope[:, 3:4] + slope[:, 4:5]], 1)


def _over_training_grid(centre: Array, mean: float) -> Array:
    sizes = mean + np.array([-3.0, -1.5, 0.0])
    return np.array(list(itertools.product(sizes, sizes, mean + np.array([-3.0, -1.0, -0.3]), [0.1, 0.3, 0.6, 1.2])))


def _over_training_natural(theta: Array, centre: Array) -> Named:
    # L = E + (a·M^η + b·M^−η)·C^−η with M = D/N, C = 6·N·D is E + a·6^−η·N^−2η + b·6^−η·D^−2η.
    a, b, e, twice = theta.T
    eta = twice / 2
    scale = 6**eta
    found = {"a": scale * np.exp(a + twice * centre[0]), "b": scale * np.exp(b + twice * centre[1])}
    return found | {"E": np.exp(e), "eta": eta}


def _over_training_powers(theta: Array, centre: Array) -> tuple[Array, Array, Array, Array]:
    return _chinchilla_powers(theta[:, [0, 1, 2, 3, 3]], centre)


def _predict_kaplan(theta: Array, x: Array) -> tuple[Array, Array]:
    """θ = (u, v, r, log α_D): log L = α_D·LSE(u − r log N, v − log D), r = α_N/α_D."""
    u, v, ratio, log_power = theta.T[:, :, None]
    n, d = x[:, 0], x[:, 1]
    total, share = softmax_sum(np.stack([u - ratio * n, v - d], 1))
    power = np.exp(log_power)
    slope = np.stack([share[:, 0], share[:, 1], -share[:, 0] * n, total], 1)
    return power * total, power[:, None] * slope


def _kaplan_grid(centre: Array, mean: float) -> Array:
    starts = []
    for power, ratio, first, second in itertools.product(
        [0.03, 0.1, 0.3, 1.0], [0.3, 0.8, 1.5, 3.0], [-2, 0, 2], [-2, 0, 2]
    ):
        starts.append([mean / power + first, mean / power + second, ratio, np.log(power)])
    return np.array(starts)


def _kaplan_natural(theta: Array, centre: Array) -> Named:
    u, v, ratio, log_power = theta.T
    power = np.exp(log_power)
    return {
        "N_c": np.exp(u / ratio + centre[0]),
        "D_c": np.exp(v + centre[1]),
        "alpha_N": ratio * power,
        "alpha_D": power,
    }


def _kaplan_powers(theta: Array, centre: Array) -> tuple[Array, Array, Array, Array]:
    u, v, ratio, _ = theta.T
    return u + ratio * centre[0], ratio, v + centre[1], np.ones_like(ratio)


CHINCHILLA = Form(
    "chinchilla",
    "L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2203.15556, eq. 2)",
    ("A", "B", "E", "alpha", "beta"),
    False,
    predict_chinchilla,
    _chinchilla_grid,
    _chinchilla_natural,
    _chinchilla_powers,
)
KAPLAN = Form(
    "kaplan",
    "L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D (Kaplan et al. 2001.08361, eq. 1.5)",
    ("N_c", "D_c", "alpha_N", "alpha_D"),
    False,
    _predict_kaplan,
    _kaplan_grid,
    _kaplan_natural,
    _kaplan_powers,
)
OVER_TRAINING = Form(
    "over_training",
    "L = E + (a*M^eta + b*M^-eta)*C^-eta, M = D/N, C = 6*N*D (Gadre et al. 2403.08540)",
    ("a", "b", "E", "eta"),
    True,
    _predict_over_training,
    _over_training_grid,
    _over_training_natural,
    _over_training_powers,
)
FORMS = {form.name: form for form in (CHINCHILLA, KAPLAN, OVER_TRAINING)}


def optimum(form: Form, theta: Array, centre: Array, flops: float, factor: float) -> tuple[Array, Array, Array]:
    """N*, D* and the loss there, each [S], nan where the law has no optimum: Hoffmann et al. eq. 4."""
    coefficient, exponent = law(form, theta, centre, factor)
    with np.errstate(all="ignore"):
        parameters = coefficient * flops**exponent
        tokens = flops / (factor * parameters)
        x = np.stack([np.log(parameters) - centre[0], np.log(tokens) - centre[1]], 1)
        loss = np.array([form.predict(row[None], here[None])[0][0, 0] for row, here in zip(theta, x, strict=True)])
    return parameters, tokens, np.exp(loss)


def law(form: Form, theta: Array, centre: Array, factor: float) -> tuple[Array, Array]:
    """N* = coefficient·C^exponent, each [S]; D* follows from C = factor·N·D."""
    log_a, alpha, log_b, beta = form.powers(theta, centre)
    with np.errstate(all="ignore"):
        exponent = beta / (alpha + beta)
        log_g = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
        coefficient = np.exp(log_g - exponent * np.log(factor))
    real = (alpha > 0) & (beta > 0)
    return np.where(real, coefficient, np.nan), np.where(real, exponent, np.nan)
