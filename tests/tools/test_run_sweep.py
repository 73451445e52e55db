"""A sweep end to end by the real `sisa`: killed and continued, a run that fails, the tables; measured speed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import run_sweep
from sweep_grid import load_grid
from sweep_results import COLUMNS, CURVES, state_of
from sweep_rules import config_hash, make_runs
from sweeps import tree, until, write

from data_pipeline.index import Index
from runs import losses
from sisa_dist.config import load_config
from sisa_dist.training.metrics_file import read_metrics

STEPS = 150


@pytest.fixture
def grid(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One size, one mixer, STEPS steps, on the data of the tiny run."""
    root = str(Path(run_sweep.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    (data,) = [key.partition("=")[2] for key in tiny_overrides if key.startswith("data.folder=")]
    (text,) = [key.partition("=")[2] for key in tiny_overrides if key.startswith("data.input=")]
    content = tree(tmp_path / "out", data, grids=[{"mixers": ["sisa"], "d_s": [8], "tokens": [STEPS * 256.0]}])
    content["base"]["data"]["input"] = text
    return write(tmp_path, content)


def start(grid: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, run_sweep.__file__, "run", str(grid), *more], start_new_session=True)


def until_step(folder: Path, step: int) -> None:
    def there() -> bool:
        return (folder / "metrics.jsonl").exists() and len(read_metrics(folder).get("train", [])) >= step

    until(f"step {step} in {folder}", there)


def test_killed_and_run_again_it_goes_on_and_a_failed_run_is_named(
    grid: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The launcher gets SIGKILL; its run saves. Beside it a run whose folder is in the way."""
    out, (run,) = tmp_path / "out", make_runs(load_grid(grid))
    launcher = start(grid)
    until_step(run.folder, 5)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait(600)
    until("the run has saved and left", lambda: state_of(out, run).status != "running")
    saved = [record["step"] for record in read_metrics(run.folder)["checkpoint"]]
    assert saved and 5 <= saved[-1] < STEPS
    assert run_sweep.main(["status", str(grid)]) == 0
    assert f"missing   {run.name}  step {saved[-1]} of {STEPS}" in capfd.readouterr().out
    good = f"{{mixers: [sisa], d_s: [8], tokens: [{STEPS * 256}.0]}}"
    two = [f"--set=grids=[{good}, {{mixers: [attention], tokens: [2048.0]}}]"]
    bad = out / "runs" / "a_attention_t2048_s0"
    bad.write_text("in the way", encoding="utf-8")
    assert run_sweep.main(["run", str(grid), *two]) == 1
    said = capfd.readouterr().out
    assert "1 finished, 0 running, 1 failed, 0 missing" in said
    assert "failed: a_attention_t2048_s0: sisa: output_dir" in said and "the same command goes on" in said
    metrics = read_metrics(run.folder)
    assert [record["step"] for record in metrics["train"]] == list(range(1, STEPS + 1))
    table = pandas.read_parquet(out / "results.parquet")
    assert tuple(table.columns) == COLUMNS == tuple(pandas.read_csv(out / "results.csv").columns)
    first, second = table.to_dict("records")
    assert (first["status"], second["status"]) == ("finished", "failed") and pandas.isna(second["loss"])
    final = json.loads((run.folder / "final.json").read_text(encoding="utf-8"))
    assert first["loss"] == final["perplexity"]["loss"] and final["step"] == STEPS
    assert first["loss"] < metrics["evaluation"][0]["validation_loss"] and first["tokens_per_second"] > 0
    assert (first["parameters"], first["tokens"], first["d_s"]) == (run.shape.parameters, STEPS * 256, 8)
    data = Index.load(f"{run.config.data.folder}/train")
    assert first["unique_tokens"] == second["unique_tokens"] == data.num_tokens > 0
    assert first["config_hash"] == config_hash(load_config(run.folder / "config.yaml")) == run.config_hash
    curves = pandas.read_csv(out / "curves.csv")
    assert tuple(curves.columns) == CURVES and list(curves["tokens"]) == [STEPS * 128, STEPS * 256]
    assert curves["flops"].iloc[-1] == pytest.approx(run.flops) and list(curves["loss"]) == [
        record["validation_loss"] for record in metrics["evaluation"]
    ]
    # Another grid does not go on with these runs, nor does it take their results for its own.
    shutil.rmtree(run.folder / "checkpoints")
    for command in ("run", "plan", "status"):
        assert run_sweep.main([command, str(grid), "--set=lr=2e-3"]) == 2
        assert "was begun with other settings than the grid's now" in capfd.readouterr().err


@pytest.mark.slow
def test_continued_over_hosts_it_is_the_run_that_nothing_stopped(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to the launcher over two hosts, then the rest here; against another sweep, to the bit."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text('#!/bin/bash\nexec bash -c "$4"\n', encoding="utf-8")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    seeds = f"--set=grids=[{{mixers: [sisa], d_s: [8], tokens: [{STEPS * 256}.0], seeds: [0, 1]}}]"
    runs = make_runs(load_grid(grid, [seeds.removeprefix("--set=")]))
    launcher = start(grid, seeds, "--hosts", "one,two")
    for run in runs:
        until_step(run.folder, 3)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(600) == 75
    assert all(len(read_metrics(run.folder)["train"]) < STEPS for run in runs)
    assert run_sweep.main(["run", str(grid), seeds, "--jobs", "2"]) == 0
    assert run_sweep.main(["run", str(grid), seeds, f"--set=output_dir={tmp_path / 'whole'}"]) == 0
    for run in runs:
        assert losses(run.folder) == losses(tmp_path / "whole" / "runs" / run.name)
    tables = [pandas.read_csv(folder / "results.csv") for folder in (tmp_path / "out", tmp_path / "whole")]
    assert list(tables[0]["loss"]) == list(tables[1]["loss"])
    assert list(tables[0]["config_hash"]) == list(tables[1]["config_hash"])


@pytest.mark.slow
def test_a_run_has_the_devices_of_the_grid_also_where_they_are_cores(grid: Path, tmp_path: Path) -> None:
    """Two processes here, by launch.sh, and on a host by the same job."""
    two = ["--set=machine={devices: 2}", "--set=base.training.micro_batch_size=1"]
    two.append("--set=grids=[{mixers: [sisa], d_s: [8], tokens: [2048.0]}]")
    assert run_sweep.main(["run", str(grid), *two]) == 0
    (log,) = (tmp_path / "out" / "logs").iterdir()
    assert "--nproc-per-node 2 -m sisa_dist.cli train" in log.read_text(encoding="utf-8")
    assert list(pandas.read_csv(tmp_path / "out" / "results.csv")["status"]) == ["finished"]


@pytest.mark.slow
def test_a_plan_measures_each_model_once(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "--set=grids=[{mixers: [sisa, attention], d_s: [8], tokens: [2048.0, 4096.0]}]"
    assert run_sweep.main(["plan", str(grid), more, "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("measuring ") == 2 and "speed measured here, by a few steps of each of 2 models" in said
    assert run_sweep.main(["plan", str(grid), more, "--jobs", "2"]) == 0
    assert "measuring" not in capsys.readouterr().out and not (tmp_path / "out" / "runs").exists()
