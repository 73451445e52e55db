"""Its charts: ticks, thinned curves, and every value that a float can have."""

from __future__ import annotations

import math
import re

import pytest

from sisa_dist.report.chart import Line, Scale, heat_map, labels, line_chart, thin, tidy


def test_thinning_keeps_ends_peaks_and_gaps() -> None:
    x = [float(i) for i in range(5000)]
    y = [math.sin(i / 300) for i in range(5000)]
    y[1234], y[3456], y[4010] = 9.0, -9.0, 8.0
    y[1200], y[4000] = math.nan, math.inf  # beside peaks
    y[2500:2700] = [math.nan] * 200
    kept = thin(x, y, 100)
    assert len(kept) <= 100 and kept[0] == (0.0, y[0]) and kept[-1] == (4999.0, y[-1])
    assert {(1234.0, 9.0), (3456.0, -9.0), (4010.0, 8.0)} <= set(kept)
    gaps = [place for place, value in kept if not math.isfinite(value)]
    assert gaps and all(2500 <= place < 2700 for place in gaps)
    assert [point[0] for point in kept] == sorted(point[0] for point in kept)
    assert thin(x[:50], y[:50], 100) == list(zip(x[:50], y[:50], strict=True))


@pytest.mark.parametrize(
    ("values", "log", "wanted"),
    [
        ([0.0, 10.0], False, [0, 2, 4, 6, 8, 10]),
        ([3.1, 3.4], False, [3.1, 3.15, 3.2, 3.25, 3.3, 3.35, 3.4]),
        ([1.0, 100.0], True, [1, 2, 5, 10, 20, 50, 100]),
        ([1e12, 1e18], True, [10.0**k for k in range(12, 19)]),
        ([3.5, 14.0], True, [4, 6, 8, 10, 12, 14]),
        ([1.1e12, 1.9e12], True, [n * 1e11 for n in (12, 14, 16, 18)]),
        ([-1e308, 1e308], False, [n * 5e279 for n in range(-2, 3)]),
    ],
)
def test_ticks_are_round_and_few(values: list[float], log: bool, wanted: list[float]) -> None:
    scale = Scale(values, (0.0, 100.0), log=log, margin=0.0)
    assert scale.ticks() == pytest.approx(wanted)
    assert scale(values[0]) == pytest.approx(0) and scale(values[-1]) == pytest.approx(100)


@pytest.mark.parametrize("x", [(3.2e12,), (1.1e12, 1.9e12), (1e308,), (1.0, 1e308), (5e-324,), (1.0, math.inf)])
@pytest.mark.parametrize("y", [3.0, 1e308, -1e308, math.nan])
def test_every_value_of_a_float_is_drawn(x: tuple[float, ...], y: float) -> None:
    """However little of a decade the values span, and however far apart they are."""
    for log_y in (False, None):
        lines = [Line("a", x, [y] * len(x), "--c:red"), Line("b", x, [2.0, 1e308][: len(x)], "--c:red")]
        drawn = line_chart("t", lines, x_label="x", log_x=True, log_y=log_y)
        places = [float(value) for found in re.findall(r'c[xy]="([^"]*)"', drawn) for value in found.split()]
        assert places and all(0 <= place <= 420 for place in places)
        assert drawn.count('class="tick"') > 1 and drawn.count('class="grid"') > 1


def test_values_alike_empty_and_not_positive_are_drawn() -> None:
    def line(*y: float) -> Line:
        return Line("a", [float(i + 1) for i in range(len(y))], y, "--c:red")

    assert line_chart("t", [line(math.nan)], x_label="x") == "" and line_chart("t", [], x_label="x") == ""
    for y in ((2.0, 2.0), (0.0, 0.0), (-1.0, 5.0), (1.0,), (1e-30, 1e-30)):
        for log_y in (False, None):
            assert "nan" not in line_chart("t", [line(*y)], x_label="x", log_y=log_y)
    assert line_chart("t", [line(1.0, math.nan, 2.0, 3.0)], x_label="x").count("<polyline") == 1
    assert heat_map("t", ["1"], ["a"], [[math.nan]]).count("<rect") == 0
    assert labels([0.31345, 0.3135, 0.31355]) == ["0.31345", "0.3135", "0.31355"] and labels([5.0]) == ["5"]
    assert labels([0.0, 0.5, 1.0, 1.5]) == ["0", "0.5", "1", "1.5"]
    assert [tidy(v) for v in (0.0, 1e-5, 0.25, 950.0, 1500.0, 2.5e6)] == ["0", "1e-05", "0.25", "950", "1.5k", "2.5M"]
