"""The curves: what is drawn where, for one run and several, and one line where nothing can be drawn."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sisa_dist.training.metrics_file import smooth

_PATH = Path(__file__).parents[2] / "tools/plot_run.py"
_SPEC = importlib.util.spec_from_file_location("plot_run_under_test", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
plot_run = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = plot_run
_SPEC.loader.exec_module(plot_run)


def make_run(folder: Path, *, steps: int = 60, layers: int = 2, evaluations: bool = True, loss: float = 3.0) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as out:
        for step in range(1, steps + 1):
            record: dict[str, object] = dict(kind="train", step=step, tokens=100 * step, seconds=0.5 * step, lr=1e-3)
            record |= dict(loss=loss + 2 / step, grad_norm=5 / step, tokens_per_second=200.0, mfu=0.3, memory_bytes=1)
            out.write(json.dumps(record) + "\n")
            if evaluations and step % 20 == 0:
                out.write(json.dumps(dict(kind="evaluation", step=step, validation_loss=loss + 0.1)) + "\n")
                if layers:
                    values = {"lambda": [0.3] * (layers - 1) + [None], "half_life": [100.0] * (layers - 1) + [None]}
                    out.write(json.dumps(dict(kind="layers", step=step, **values)) + "\n")
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """The figures that were drawn, kept open to be looked at."""
    kept: list = []
    close = plot_run.plt.close
    monkeypatch.setattr(plot_run.plt, "close", kept.append)
    yield kept
    for figure in kept:
        close(figure)


def axes(figure) -> dict[str, object]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_one_run_has_every_curve(tmp_path: Path, figures: list, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert plot_run.main([str(run)]) == 0
    assert is_png(run / "curves.png") and str(run / "curves.png") in capsys.readouterr().out
    drawn = axes(figures[0])
    assert [title.split(" ")[0] for title in drawn] == ["Loss", "Learning", "Gradient", "Tokens", "λ", "Half-life"]
    raw, smooth, held_out = drawn["Loss"].lines
    np.testing.assert_allclose(raw.get_ydata(), [3 + 2 / step for step in range(1, 61)])
    assert raw.get_alpha() < 0.5 and len(smooth.get_xdata()) == 60
    np.testing.assert_allclose(held_out.get_ydata(), 3.1)
    np.testing.assert_allclose(held_out.get_xdata(), [20, 40, 60])
    # The second layer has no SSM: it has no line.
    (lam,) = drawn["λ by layer (mean over heads)"].lines
    np.testing.assert_allclose(lam.get_ydata(), 0.3)


@pytest.mark.parametrize(("x", "unit"), [("tokens", 100), ("seconds", 0.5)])
def test_every_curve_stands_on_the_chosen_axis(tmp_path: Path, figures: list, x: str, unit: float) -> None:
    assert plot_run.main([str(make_run(tmp_path / "run")), "--x", x, "--out", str(tmp_path / "p.png")]) == 0
    drawn = axes(figures[0])
    raw, _, held_out = drawn["Loss"].lines
    np.testing.assert_allclose(raw.get_xdata(), unit * np.arange(1, 61))
    np.testing.assert_allclose(held_out.get_xdata(), [20 * unit, 40 * unit, 60 * unit])
    (lam,) = drawn["λ by layer (mean over heads)"].lines
    np.testing.assert_allclose(lam.get_xdata(), [20 * unit, 40 * unit, 60 * unit])
    assert all(plot_run._AXES[x] == axis.get_xlabel() for axis in drawn.values())


def test_several_runs_overlay_under_names_that_differ(tmp_path: Path, figures: list) -> None:
    runs = [make_run(tmp_path / "a/run"), make_run(tmp_path / "b/run", loss=4.0), make_run(tmp_path / "c", layers=0)]
    out = tmp_path / "all.png"
    assert plot_run.main([*map(str, runs), str(runs[0]), "--out", str(out)]) == 0
    assert is_png(out)
    drawn = axes(figures[0])
    legend = [text.get_text() for text in drawn["Loss"].get_legend().get_texts()]
    assert legend[0::2] == [f"{name}: training" for name in ("a/run", "b/run", f"{tmp_path.name}/c")]
    assert len({line.get_color() for line in drawn["Loss"].lines}) == 3
    assert len(drawn["λ by layer (mean over heads)"].lines) == 2


def test_without_evaluation_and_layers(tmp_path: Path, figures: list) -> None:
    assert plot_run.main([str(make_run(tmp_path / "run", steps=1, evaluations=False))]) == 0
    drawn = axes(figures[0])
    assert len(drawn) == 4 and len(drawn["Loss"].lines) == 2


def test_a_run_that_diverged_can_still_be_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 3.1,', '"loss": NaN,'))  # step 20
    assert "NaN" in path.read_text()
    assert plot_run.main([str(run)]) == 0 and is_png(run / "curves.png")


def test_nothing_to_draw_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    good = make_run(tmp_path / "good")
    for arguments, said in (
        ([str(tmp_path / "none")], "cannot be read"),
        ([str(tmp_path)], "cannot be read"),
        ([str(tmp_path / "empty")], "no training step"),
        ([str(tmp_path / "old")], "has no 'loss'"),
        ([str(good), str(tmp_path / "none")], "cannot be read"),
        ([str(good), "--out", str(tmp_path / "no/where.png")], "cannot be written"),
        ([str(good), "--out", str(tmp_path / "x.abc")], "cannot be written"),
    ):
        assert plot_run.main(arguments) == 2
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_smoothing_follows_without_lag() -> None:
    line = np.arange(200.0)
    inner = slice(20, -20)
    np.testing.assert_allclose(smooth(line)[inner], line[inner])  # a trailing mean would stand below it
    np.testing.assert_allclose(smooth(np.full(7, 2.0)), 2.0)
    noisy = np.where(np.arange(400) % 2, 1.0, -1.0)
    assert np.abs(smooth(noisy)[40:-40]).max() < 0.1
    gap = smooth(np.array([1.0] * 50 + [math.nan] + [1.0] * 49))
    np.testing.assert_allclose(gap, 1.0)


def test_learned_d_s_has_a_line_a_layer(tmp_path: Path, figures: list) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as out:
        for step in (20, 40):
            values = dict(layers=[0, 2], d_s=[16.0 - step / 10, 8.0], expected=[15.0, 9.0], share=0.5)
            out.write(json.dumps(dict(kind="d_s", step=step, **values)) + "\n")
    assert plot_run.main([str(run), str(make_run(tmp_path / "other")), "--out", str(tmp_path / "p.png")]) == 0
    drawn = axes(figures[0])
    first, second = drawn["d_s by layer (dark: first layer, light: last)"].lines
    np.testing.assert_allclose(first.get_ydata(), [14, 12])
    np.testing.assert_allclose(second.get_ydata(), [8, 8])
    np.testing.assert_allclose(first.get_xdata(), [20, 40])
    evaluated, expected = drawn["d_s, mean over layers"].lines
    np.testing.assert_allclose(evaluated.get_ydata(), [11, 10])
    np.testing.assert_allclose(expected.get_ydata(), [12, 12])
    assert is_png(tmp_path / "p.png")
