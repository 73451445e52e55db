"""The laws: derivatives, the papers' formulas, the objective, the optimum, and parameters found again."""

from __future__ import annotations

from dataclasses import replace

import fit_repeated as fit_repeated_module
import numpy as np
import pytest
from fit_d_s import predict_d_s
from fit_forms import CHINCHILLA, FORMS, KAPLAN, OVER_TRAINING, Form, law, optimum
from fit_optimise import Objective, best_of_grid, minimise
from fit_parametric import fit_form, hold_out_largest
from fit_repeated import describe_repeated, fit_repeated, hold_out_repeated, predict_repeated
from fit_table import Points
from scipy.special import huber

CENTRE = np.array([np.log(2e8), np.log(5e9)])
N, D = (grid.ravel() for grid in np.meshgrid(np.geomspace(2e7, 3e9, 5), np.geomspace(5e8, 1e11, 4)))
X = np.stack([np.log(N), np.log(D)], 1) - CENTRE
THETA = {
    "chinchilla": np.array([-0.5, -0.3, 0.6, 0.34, 0.37]),
    "kaplan": np.array([9.0, 8.0, 0.8, np.log(0.1)]),
    "over_training": np.array([-0.5, -0.3, 0.6, 0.28]),
}


def make_points(parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray, **more: np.ndarray) -> Points:
    none = np.full(len(loss), np.nan)
    return Points(
        parameters,
        tokens,
        6 * parameters * tokens,
        loss,
        more.get("d_s", none),
        more.get("unique", none),
        tuple(f"run{i}" for i in range(len(loss))),
    )


def numeric(predict, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[P, n] by central differences."""
    step = 1e-6
    moves = np.eye(len(theta)) * step
    return np.stack(
        [(predict((theta + m)[None], x)[0] - predict((theta - m)[None], x)[0])[0] / (2 * step) for m in moves]
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_derivatives_of_the_laws(form: Form) -> None:
    theta = THETA[form.name]
    np.testing.assert_allclose(
        form.predict(theta[None], X)[1][0], numeric(form.predict, theta, X), rtol=1e-5, atol=1e-9
    )


def test_derivatives_of_d_s_and_of_repeated_data() -> None:
    x = np.concatenate([X, np.log(np.resize([8.0, 16, 32, 64], len(X)))[:, None] - 3], 1)
    for theta in (np.r_[THETA["chinchilla"], -4.0, 0.3], np.r_[THETA["chinchilla"], -4.0, 0.3, 0.2]):
        np.testing.assert_allclose(
            predict_d_s(theta[None], x)[1][0], numeric(predict_d_s, theta, x), rtol=1e-5, atol=1e-9
        )
    x[:, 2] = np.minimum(X[:, 1], np.log(4e9) - CENTRE[1])
    theta = np.r_[THETA["chinchilla"], np.log(15.0), np.log(5.0)]
    slope = predict_repeated(theta[None], x)[1][0]
    np.testing.assert_allclose(slope, numeric(predict_repeated, theta, x), rtol=1e-5, atol=1e-8)
    assert (np.abs(slope).max(1) > 1e-4).all()


def test_the_laws_are_the_papers() -> None:
    """Each law at its natural parameters against its formula written out."""
    found = {
        name: {k: v[0] for k, v in form.natural(THETA[name][None], CENTRE).items()} for name, form in FORMS.items()
    }
    loss = {name: form.loss(THETA[name][None], CENTRE, N, D)[0] for name, form in FORMS.items()}
    c, k, o = found["chinchilla"], found["kaplan"], found["over_training"]
    np.testing.assert_allclose(loss["chinchilla"], c["E"] + c["A"] / N ** c["alpha"] + c["B"] / D ** c["beta"])
    inside = (k["N_c"] / N) ** (k["alpha_N"] / k["alpha_D"]) + k["D_c"] / D
    np.testing.assert_allclose(loss["kaplan"], inside ** k["alpha_D"])
    multiple, flops = D / N, 6 * N * D
    powers = o["a"] * multiple ** o["eta"] + o["b"] * multiple ** -o["eta"]
    np.testing.assert_allclose(loss["over_training"], o["E"] + powers * flops ** -o["eta"])


def test_repeated_data_is_the_papers_formula() -> None:
    """2305.16264, at constants of the size it found."""
    a, b, e, alpha, beta, r_d, r_n = 521.0, 1488.0, 1.87, 0.353, 0.353, 15.4, 5.31
    unique = np.minimum(D, 3e9)
    theta = np.array([np.log(a) - alpha * CENTRE[0], np.log(b) - beta * CENTRE[1], np.log(e), alpha, beta])
    x = np.concatenate([X, np.log(unique)[:, None] - CENTRE[1]], 1)
    got = np.exp(predict_repeated(np.r_[theta, np.log(r_d), np.log(r_n)][None], x)[0][0])
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    best = g * (unique * g) ** (beta / alpha)  # N_opt of U_D: D_opt = (C/6)^(α/(α+β)) / G, N_opt = G·(C/6)^(β/(α+β))
    used = np.minimum(N, best)
    tokens = unique + unique * r_d * (1 - np.exp(-(D / unique - 1) / r_d))
    size = used + used * r_n * (1 - np.exp(-(N / used - 1) / r_n))
    np.testing.assert_allclose(got, e + a / size**alpha + b / tokens**beta, rtol=1e-10)
    assert (tokens < 0.9 * D).any() and (size < 0.9 * N).any()


def test_the_objective_is_the_sum_of_the_huber_loss_on_log_loss() -> None:
    y = np.linspace(0.5, 1.5, len(X))
    objective = Objective(CHINCHILLA.predict, X, y)
    error = CHINCHILLA.predict(THETA["chinchilla"][None], X)[0][0] - y
    np.testing.assert_allclose(objective.value(THETA["chinchilla"]), huber(1e-3, error).sum())
    squared = Objective(CHINCHILLA.predict, X, y, squares=True)
    np.testing.assert_allclose(squared.value(THETA["chinchilla"]), ((np.exp(error + y) - np.exp(y)) ** 2).sum())
    rows = np.zeros(1, np.intp)
    for one in (objective, squared, Objective(CHINCHILLA.predict, X, y, weights=np.arange(len(X)) % 3 * 1.0)):
        moves = 1e-7 * np.eye(5)
        slope = [
            (one((THETA["chinchilla"] + m)[None], rows)[0] - one((THETA["chinchilla"] - m)[None], rows)[0])
            for m in moves
        ]
        np.testing.assert_allclose(
            one(THETA["chinchilla"][None], rows)[1][0], np.ravel(slope) / 2e-7, rtol=1e-4, atol=1e-4
        )


def test_every_start_of_a_batch_reaches_its_minimum() -> None:
    """Rosenbrock's valley, a bowl and a kink, each row its own function."""

    def function(theta: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = theta.T
        valley = 100 * (y - x**2) ** 2 + (1 - x) ** 2, -400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)
        bowl = x**2 + 5 * y**2, 2 * x, 10 * y
        kink = np.abs(x - 1) + np.abs(y + 2), np.sign(x - 1), np.sign(y + 2)
        value, dx, dy = (np.choose(rows % 3, each) for each in zip(valley, bowl, kink, strict=True))
        return value, np.stack([dx, dy], 1)

    start = np.random.default_rng(0).normal(0, 2, (30, 2))
    theta, _ = minimise(function, start, points=10_000, iterations=400)
    np.testing.assert_allclose(theta, np.tile([[1, 1], [0, 0], [1, -2]], (10, 1)), atol=1e-4)


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_the_optimum_is_the_least_loss_at_its_flops(form: Form) -> None:
    theta, flops = THETA[form.name][None], 3e20
    parameters, tokens, loss = (float(v[0]) for v in optimum(form, theta, CENTRE, flops, 6.0))
    np.testing.assert_allclose(6 * parameters * tokens, flops)
    around = parameters * np.exp(np.linspace(-1, 1, 201))
    along = form.loss(theta, CENTRE, around, flops / 6 / around)[0]
    assert np.argmin(along) == 100 and loss == pytest.approx(along[100])
    coefficient, exponent = law(form, theta, CENTRE, 6.0)
    assert parameters == pytest.approx(float(coefficient[0] * flops ** exponent[0]))
    # A law whose loss rises with size has no optimum.
    theta = theta.copy()
    theta[0, {"chinchilla": 3, "kaplan": 2, "over_training": 3}[form.name]] *= -1
    assert np.isnan(optimum(form, theta, CENTRE, flops, 6.0)[0]).all()


@pytest.mark.parametrize("form", (KAPLAN, OVER_TRAINING), ids=lambda form: form.name)
def test_a_law_finds_its_own_parameters_again(form: Form) -> None:
    loss = form.loss(THETA[form.name][None], CENTRE, N, D)[0]
    fit = fit_form(form, make_points(N, D, loss), squares=None, draws=0, seed=0)
    expected = form.natural(THETA[form.name][None], CENTRE)
    for name, value in form.natural(fit.theta[None], fit.centre).items():
        np.testing.assert_allclose(value, expected[name], rtol=0.01, err_msg=name)
    held_out = hold_out_largest(fit, squares=None)
    assert held_out is not None and len(held_out.runs) == 4 and held_out.mean < 1e-3


def test_held_out_runs_are_not_fitted() -> None:
    """The largest runs are made 10 % worse: the error says so, where a fit that had seen them would not."""
    loss = OVER_TRAINING.loss(THETA["over_training"][None], CENTRE, N, D)[0]
    large = np.sort(N * D)[-4] <= N * D
    fit = fit_form(OVER_TRAINING, make_points(N, D, loss * np.where(large, 1.1, 1)), squares=None, draws=0, seed=0)
    held_out = hold_out_largest(fit, squares=None)
    assert held_out is not None
    np.testing.assert_allclose(held_out.errors, 1 / 1.1 - 1, rtol=0.02)
    assert set(held_out.runs) == {f"run{i}" for i in np.flatnonzero(large)}


def test_repetition_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # 4 500 starts are for data of which nothing is known.
    one = replace(CHINCHILLA, grid=lambda centre, mean: np.array([[mean - 1, mean - 1, mean - 0.3, 0.3, 0.3]]))
    monkeypatch.setattr(fit_repeated_module, "CHINCHILLA", one)
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(2e7, 3e9, 5), np.geomspace(5e8, 1e11, 6)))
    unique = np.minimum(d, np.tile([2e9, 1e12], len(d) // 2))
    truth = np.r_[THETA["chinchilla"], np.log(12.0), np.log(4.0)]
    x = np.stack([np.log(n) - CENTRE[0], np.log(d) - CENTRE[1], np.log(unique) - CENTRE[1]], 1)
    noise = 1 + 1e-4 * np.random.default_rng(0).standard_normal(len(n))
    loss = np.exp(predict_repeated(truth[None], x)[0][0]) * noise
    fit = fit_repeated(make_points(n, d, loss, unique=np.where(unique < d, unique, np.nan)), draws=20, seed=0)
    np.testing.assert_allclose(np.exp(fit.theta[5:]), [12, 4], rtol=0.1)
    held_out = hold_out_repeated(fit)
    assert held_out is not None and len(held_out.runs) == 6 and held_out.mean < 0.01
    entry = describe_repeated(fit, [1e21], 2e9, 6.0)
    assert entry["intervals"]["R_D"][0] < 12.5 and entry["intervals"]["R_D"][1] > 11.5
    # With 2e9 tokens to repeat the best model is smaller than with as many as it likes, its tokens are seen again.
    free = describe_repeated(fit, [1e21], 1e13, 6.0)["optimum"][0]
    best = entry["optimum"][0]
    assert best["tokens"] > best["unique_tokens"] and best["loss"] > free["loss"]
    known = {k: v[0] for k, v in CHINCHILLA.natural(fit.theta[None, :5], fit.centre).items()}
    expected = optimum(CHINCHILLA, fit.theta[None, :5], fit.centre, 1e21, 6.0)[0][0]
    assert known["E"] > 0 and free["parameters"] == pytest.approx(expected, rel=0.03)


def test_the_grid_is_hoffmanns() -> None:
    grid = CHINCHILLA.grid(np.zeros(2), 1.0)
    assert grid.shape == (4500, 5) and [len(np.unique(column)) for column in grid.T] == [6, 6, 5, 5, 5]
    centred = CHINCHILLA.grid(CENTRE, 1.0)
    natural = CHINCHILLA.natural(centred, CENTRE)
    np.testing.assert_allclose(np.log(natural["A"]), grid[:, 0], atol=1e-9)


def test_the_best_of_several_minima_is_kept() -> None:
    """A start at which a term has vanished stays there; another finds the law."""
    y = CHINCHILLA.predict(THETA["chinchilla"][None], X)[0][0]
    objective = Objective(CHINCHILLA.predict, X, y)
    dead = np.array([-60.0, -60.0, 0.5, 1.0, 1.0])
    best, ends = best_of_grid(objective, np.stack([dead, THETA["chinchilla"] + 0.05]))
    np.testing.assert_allclose(best, THETA["chinchilla"], atol=1e-3)
    np.testing.assert_allclose(ends[0], best)
