"""What the command makes of a table before it fits: the runs' own FLOPs, sizes that are one, slices, notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fit_scaling_law
import numpy as np
import pandas as pd
import pytest
import sweep_next
from fit_envelope import fit_envelope
from fit_forms import OVER_TRAINING
from fit_isoflop import slices_of
from fit_parametric import without_largest
from test_fit_forms import CENTRE, THETA, make_points

from sisa_dist.config import UserError


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_scaling_law, "draw", lambda *_: None)


def make_runs(ratio: float, *, mixer: str = "sisa", scale: float = 1.0) -> pd.DataFrame:
    """4 sizes × 4 token budgets of the over-training law, C = ratio·N·D; equal sizes differ by 0.2 %."""
    rows = []
    for size in np.geomspace(2e7, 2e9, 4):
        for number, tokens in enumerate(scale * np.geomspace(4e8, 4e10, 4)):
            n = size * (1 + 0.001 * (number % 3))
            loss = OVER_TRAINING.loss(THETA["over_training"][None], CENTRE, np.array([n]), np.array([tokens]))[0, 0]
            row = {"run": f"{mixer}{len(rows)}", "mixer": mixer, "parameters": n, "tokens": tokens, "loss": loss}
            rows.append(row | {"flops": ratio * n * tokens})
    return pd.DataFrame(rows)


def fitted(tmp_path: Path, frame: pd.DataFrame, *options: str) -> dict[str, Any]:
    frame.to_csv(tmp_path / "runs.csv", index=False)
    command = [str(tmp_path / "runs.csv"), "--form", "over_training", "--bootstrap", "0", *options]
    assert fit_scaling_law.main(command) == 0
    return json.loads((tmp_path / "fit/fit.json").read_text())


def test_optima_have_the_flops_of_each_groups_own_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = pd.concat([make_runs(8.0), make_runs(7.0, mixer="attention", scale=2.0)])
    result = fitted(tmp_path, both, "--by", "mixer")
    assert "note: " not in capsys.readouterr().out
    for entry in result["fits"]:
        ratio = {"sisa": 8.0, "attention": 7.0}[entry["where"]["mixer"]]
        assert entry["factor"] == entry["ratio"] == pytest.approx(ratio)
        for best in entry["optimum"]:
            assert ratio * best["parameters"] * best["tokens"] == pytest.approx(best["flops"])
    # One table's budgets, so that its groups can be compared.
    first, second = ([best["flops"] for best in entry["optimum"]] for entry in result["fits"])
    assert first == second == pytest.approx([10 * both["flops"].max(), 100 * both["flops"].max()])
    given = fitted(tmp_path, both, "--by", "mixer", "--flops-factor", "6")["fits"][1]
    assert given["factor"] == 6 and given["ratio"] == pytest.approx(8)
    assert "mixer=sisa the runs' FLOPs are 8·N·D (median), the optima are of C = 6·N·D" in capsys.readouterr().out


def test_a_named_tokens_column_leaves_the_flops_as_they_are(tmp_path: Path) -> None:
    frame = make_runs(8.0).rename(columns={"tokens": "seen"})
    assert fitted(tmp_path, frame, "--tokens-column", "seen")["fits"][0]["ratio"] == pytest.approx(8.0)
    without = frame.drop(columns="flops")
    assert fitted(tmp_path, without, "--tokens-column", "seen")["fits"][0]["factor"] == pytest.approx(6.0)


def test_what_is_fitted_as_one_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = pd.concat([make_runs(8.0).assign(d_s=[8, 16] * 8), make_runs(7.0, mixer="attention", scale=2.0)])
    fitted(tmp_path, both.assign(unique_tokens=2e10))
    said = " ".join(capsys.readouterr().out.split())
    assert "note: the laws of N and D take runs of mixer attention, sisa as one: --by mixer parts them" in said
    assert "note: the laws of N and D take runs of d_s 8, 16 as one" in said
    assert "note: 8 of 32 runs saw tokens more than once (at most 4 times)" in said
    fitted(tmp_path, both[both["mixer"] == "attention"].assign(unique_tokens=1e12))
    assert "note: " not in capsys.readouterr().out


def test_a_ratio_that_falls_with_the_size_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = make_runs(8.0)
    frame.loc[frame["parameters"] > 1e9, "flops"] *= 0.75
    fitted(tmp_path, frame)
    assert "note: C/(N·D) is 8 at N = 2e+07 and 6 at 2e+09, the optima are of its median, 8" in capsys.readouterr().out


def test_sizes_of_equal_parameters_are_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """d_ff solved for equal size leaves some tenths of a percent between them."""
    frame = make_runs(6.0)
    frame[frame["parameters"] < 1e8].to_csv(tmp_path / "two.csv", index=False)
    assert fit_scaling_law.main([str(tmp_path / "two.csv"), "--form", "over_training"]) == 2
    assert "needs at least 3 model sizes, and there are 2" in capsys.readouterr().err
    n = np.array([1e7, 1.002e7, 1.004e7, 2e7, 1e7, 2e7, 4e7])
    flops = np.repeat([1e17, 1.05e17, 1e18], [2, 2, 3])
    points = make_points(n, flops / (6 * n), np.ones(7))
    assert [len(part) for part in slices_of(points)] == [3]
    # Where the lowest of the curves of two equal sizes changes, no size has changed.
    curves = {name: np.stack([np.geomspace(1e15, 1e18, 50), 3 + 0.1 * np.sin(np.arange(50) + i)], 1)
              for i, name in enumerate(points.run[:3])}  # fmt: skip
    with pytest.raises(UserError, match="fewer than 3 sizes are ever lowest"):
        fit_envelope(points, curves, draws=0, seed=0, factor=6.0)


def test_a_slice_is_held_out_whole() -> None:
    flops = np.repeat([1e15, 4e15, 16e15], 5) * np.tile([1, 1.003, 0.998, 1.001, 0.9995], 3)
    n = np.tile(np.geomspace(1e6, 1e7, 5), 3)
    kept = without_largest(make_points(n, flops / (6 * n), np.ones(15)))
    assert kept.tolist() == [True] * 10 + [False] * 5


@pytest.mark.parametrize(("column", "count", "right"), [
    ("parameters", "total", True),
    ("parameters_non_embedding", "non_embedding", True),
    ("Model Size", "total", True),
    ("parameters_non_embedding", "total", False),
    ("parameters", "non_embedding", False),
])  # fmt: skip
def test_the_next_runs_count_parameters_as_the_fit_did(tmp_path: Path, column: str, count: str, right: bool) -> None:
    frame = make_runs(8.0).rename(columns={"parameters": column})
    fitted(tmp_path, frame, "--params-column", column)
    if right:
        assert len(sweep_next._fits(tmp_path / "fit/fit.json", count)) == 1
    else:
        with pytest.raises(UserError, match="fit again with --params-column parameters"):
            sweep_next._fits(tmp_path / "fit/fit.json", count)
