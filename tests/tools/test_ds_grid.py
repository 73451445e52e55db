"""The sweep of d_s: the paper's points to the column, equal parameters, runs in order and resumable."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from sisa_dist.config import load_config

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("ds_grid", ROOT / "tools/ds_grid.py")
assert _SPEC is not None and _SPEC.loader is not None
ds_grid = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = ds_grid
_SPEC.loader.exec_module(ds_grid)


@pytest.mark.parametrize("scale", ds_grid.POINTS)
def test_the_papers_points_are_the_papers_and_all_are_as_large(scale: str, tmp_path: Path) -> None:
    assert ds_grid.main(["--scale", scale, "--out", str(tmp_path)]) == 0
    for d_s in ds_grid.POINTS[scale]:
        found = load_config(tmp_path / "configs" / f"{scale}_ds{d_s}.yaml")
        total, target = (
            ds_grid.parameters(config)
            for config in (found, load_config(ROOT / f"configs/paper/{scale}_transformer.yaml"))
        )
        assert abs(total / target - 1) < 5e-4 and found.model.d_s == d_s
        paper = ROOT / "configs" / "paper" / f"{scale}_sisa_ds{d_s}.yaml"
        if d_s in (16, 32, 64, 128):
            assert found.model == load_config(paper).model and found.training == load_config(paper).training


def test_every_point_that_was_asked_for_is_there() -> None:
    assert {8, 24, 40, 48, 96} < set(ds_grid.POINTS["152m"]) and max(ds_grid.POINTS["369m"]) > 128
    assert all(set(points) >= {16, 32, 64, 128} for points in ds_grid.POINTS.values())


@pytest.fixture
def small(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """A command that takes seconds."""
    own = [f"--set={key}" for key in tiny_overrides if not key.startswith(("model.d_s", "output_dir"))]
    own += ["--set=training.steps=4", "--set=engine.precision=fp32", "--set=model.d_ff=200", "--set=data.lanes=3"]
    return ["--scale", "50m", "--d-s", "8,16", "--out", str(tmp_path / "grid"), *own]


def test_runs_in_order_and_goes_on_where_it_was_ended(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    ends = [0, -15]

    def command(path: Path) -> list[str]:
        started.append(path.stem)
        if ends and ends.pop(0):
            return ["bash", "-c", "kill -TERM $$"]
        return [sys.executable, "-m", "sisa_dist.cli", "train", str(path)]

    monkeypatch.setattr(ds_grid, "command", command)
    assert ds_grid.main([*small, "--run"]) == 128 + 15
    assert "50m_ds16.yaml ended with exit code -15; the same command goes on" in capfd.readouterr().err
    assert ds_grid.main([*small, "--run"]) == 0
    assert started == ["50m_ds8", "50m_ds16", "50m_ds16"]
    assert ds_grid.main([*small, "--run"]) == 0 and len(started) == 3
    assert capfd.readouterr().out.count("  done\n") == 3  # one line before the second run, two before the third
    assert ds_grid.main([*small, "--set=optimizer.lr=1e-3"]) == 2
    assert "its run was begun with other settings" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--d-s", "8,x"], "--d-s 8,x: give whole numbers"),
        (["--d-s", "512"], "d_s 512 at 50m: its term alone outweighs the MLP"),
        (["--d-s", "7"], "50m_ds7: model: d_s of layer 0 is 7: channels turn in pairs"),
        (["--set", "training.stepz=3"], "unknown key; did you mean steps"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ds_grid.main(["--scale", "50m", "--out", str(tmp_path / "grid"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ds_grid: ") and says in said and said.count("\n") == 1
    assert not (tmp_path / "grid").exists()
