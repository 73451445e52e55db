"""The sweep of d_s: the paper's points to the column, equal parameters, runs in order and resumable."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from sisa_dist.config import load_config
from sisa_dist.training.metrics_file import read_metrics

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
    own += [
        "--set=training.steps=4",
        "--set=engine.precision=fp32",
        "--set=model.d_ff=200",
        "--set=data.lanes=3",
        "--set=training.checkpoint_every=2",
    ]
    return ["--scale", "50m", "--d-s", "8,16", "--out", str(tmp_path / "grid"), *own]


TRAIN = """
import os, signal, sys
from sisa_dist.cli import main
from sisa_dist.engine.fsdp import FSDP2Engine

real, left = FSDP2Engine.train_step, [int(sys.argv.pop())]

def train_step(self, *arguments, **named):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(self, *arguments, **named)

FSDP2Engine.train_step = train_step
main()
"""


@pytest.mark.slow
def test_runs_in_order_and_goes_on_where_it_was_killed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second run in its fourth step, after a checkpoint behind the second."""
    started: list[str] = []
    steps = [99, 3, 99]

    def command(path: Path) -> list[str]:
        started.append(path.stem)
        return [sys.executable, "-c", TRAIN, "train", str(path), str(steps.pop(0))]

    monkeypatch.setattr(ds_grid, "command", command)
    assert ds_grid.main([*small, "--run"]) == 128 + 9
    assert "50m_ds16.yaml ended with exit code -9; the same command goes on" in capfd.readouterr().err
    assert ds_grid.main([*small, "--run"]) == 0
    assert started == ["50m_ds8", "50m_ds16", "50m_ds16"]
    second = tmp_path / "grid" / "50m_ds16"
    assert [record["step"] for record in read_metrics(second)["train"]] == [1, 2, 3, 4]
    assert [record["step"] for record in read_metrics(second)["checkpoint"]] == [2, 4]
    assert ds_grid.main([*small, "--run"]) == 0 and len(started) == 3
    assert capfd.readouterr().out.count("  done\n") == 3  # one line before the second run, two before the third
    assert ds_grid.main([*small, "--set=optimizer.lr=1e-3"]) == 2
    assert "its run was begun with other settings" in capfd.readouterr().err


def test_elsewhere_paths_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """launch.sh goes to its own folder before it reads any."""
    monkeypatch.chdir(tmp_path)
    assert ds_grid.main(["--scale", "50m", "--d-s", "8", "--out", "grid"]) == 0
    config = load_config(tmp_path / "grid" / "configs" / "50m_ds8.yaml")
    assert capsys.readouterr().out.startswith(str(tmp_path)) and config.output_dir == str(tmp_path / "grid/50m_ds8")


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
