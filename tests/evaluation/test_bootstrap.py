"""Bootstrap intervals on data whose spread is known."""

from __future__ import annotations

import numpy as np
import pytest

from sisa_dist.evaluation.bootstrap import interval


def test_of_one_run_it_is_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    low, high = interval([values], draws=4000)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """Items and runs both vary, each of 12: with so many the pigeonhole bootstrap is a little wide, never narrow."""
    rng, covered = np.random.default_rng(1), 0
    for number in range(200):
        runs, items = rng.normal(size=(12, 1)), rng.normal(size=(1, 40))
        low, high = interval(runs + items + rng.normal(size=(12, 40)), draws=300, seed=number)
        covered += low <= 0 <= high
    assert 0.87 <= covered / 200 <= 0.99


def test_runs_that_differ_widen_it() -> None:
    items = np.random.default_rng(2).normal(size=200)
    alike, apart = interval([items] * 3), interval([items - 1, items, items + 1])
    assert apart[1] - apart[0] > 3 * (alike[1] - alike[0])
    assert interval([[2.0, 2.0], [2.0, 2.0]]) == (2.0, 2.0)


def test_weights_count_an_item_as_often() -> None:
    values = np.random.default_rng(3).normal(size=(2, 300))
    low, high = interval(values, weights=np.where(np.arange(300) < 150, 1.0, 0.0))
    half = values[:, :150]
    assert low < half.mean() < high
    assert interval(values) == interval(values) != interval(values, seed=1)
