"""Saving during training: what is kept, what fails, and that the run and its last whole checkpoint survive it."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.ranks import run_ranks
from runs import assert_same_tensors, losses
from sisa_dist.checkpoint import list_checkpoints, save, verify
from sisa_dist.checkpoint.staging import Staging
from sisa_dist.checkpoint.write import write_checkpoint
from sisa_dist.config import RunConfig, UserError
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.trainer import train


def _with(config: RunConfig, **training: Any) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def _steps(config: RunConfig) -> list[int]:
    return [int(p.name[5:]) for p in list_checkpoints(Path(config.output_dir))]


def _rest(config: RunConfig) -> list[str]:
    return [p.name for p in (Path(config.output_dir) / "checkpoints").glob(".*")]


@pytest.fixture
def small_disk(tiny: RunConfig, tmp_path: Path) -> Iterator[Path]:
    """The run's checkpoint folder on a disk of its own, that a few checkpoints fill."""
    folder = Path(tiny.output_dir) / "checkpoints"
    folder.mkdir(parents=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("a small disk is made by mounting a tmpfs, which needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_the_newest_and_the_multiples_are_kept(tiny: RunConfig) -> None:
    config = _with(tiny, checkpoint_every=1, keep_last=2, keep_every=3)
    train(config, quiet=True)
    assert _steps(config) == [3, 6, 7, 8] and _rest(config) == []
    saves = read_metrics(config.output_dir)["checkpoint"]
    assert [record["step"] for record in saves] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(record["blocked_seconds"] >= 0 and record["rank_bytes"] > 0 for record in saves)


@pytest.mark.parametrize("how", [{"async_save": False}, {"save_staging_gb": 1e-9}])
def test_training_may_wait_for_its_saves(
    tiny: RunConfig, how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = _with(tiny, checkpoint_every=1, keep_last=8, **how)
    train(config, quiet=True)
    assert _steps(config) == list(range(1, 9))
    for record in read_metrics(config.output_dir)["checkpoint"]:
        assert record["blocked_seconds"] >= record["seconds"]
    assert ("is more than training.save_staging_gb" in caplog.text) == ("save_staging_gb" in how)


def test_training_goes_on_while_a_save_is_written(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first save ends only when training has reached step 6; the next one waits for it."""
    reached, held = threading.Event(), []

    def slow(final: Path, *args: Any, **kwargs: Any) -> None:
        if not held:
            held.append(reached.wait(30))
        write_checkpoint(final, *args, **kwargs)

    step = FSDP2Engine.train_step

    def train_step(engine: FSDP2Engine, *args: Any, **kwargs: Any) -> Any:
        result = step(engine, *args, **kwargs)
        if engine.step_number == 6:
            reached.set()
        return result

    monkeypatch.setattr(save, "write_checkpoint", slow)
    monkeypatch.setattr(FSDP2Engine, "train_step", train_step)
    config = _with(tiny, checkpoint_every=3)
    train(config, quiet=True)
    assert held == [True]
    assert _steps(config) == [6, 8]


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    tiny: RunConfig, small_disk: Path, tmp_path: Path
) -> None:
    config = _with(tiny, checkpoint_every=1, keep_last=100)
    with pytest.raises(UserError) as caught:
        train(config, quiet=True)
    done = _steps(config)
    assert 0 < len(done) < 8 and _rest(config) == []
    said = str(caught.value)
    assert f"step_{done[-1] + 1:08d}: cannot be written (No space left on device" in said and "\n" not in said
    assert f"the newest whole one is step_{done[-1]:08d}" in said
    for checkpoint in list_checkpoints(Path(config.output_dir)):
        verify(checkpoint)
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)  # make room
    train(config, quiet=True)
    straight = tiny.model_copy(update={"output_dir": str(tmp_path / "straight")})
    train(straight, quiet=True)
    assert losses(Path(config.output_dir)) == losses(tmp_path / "straight")
    assert_same_tensors(small_disk / "step_00000008", list_checkpoints(tmp_path / "straight")[-1])


def test_where_the_first_save_fails_the_run_begins_anew(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(save, "write_checkpoint", fails)
    with pytest.raises(UserError, match="the disk is full; there is no other one, the same command begins anew"):
        train(tiny, quiet=True)


def _train_and_catch(config: RunConfig) -> str:
    try:
        train(config, quiet=True)
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_stops_every_rank_with_the_same_line(tiny: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    config = _with(tiny, checkpoint_every=1, keep_last=100, micro_batch_size=1, steps=100)
    said = run_ranks(_train_and_catch, 2, tmp_path / "ranks", config)
    assert len(set(said)) == 1 and "No space left on device" in said[0] and "\n" not in said[0]
    done = _steps(config)
    assert done and _rest(config) == []
    verify(list_checkpoints(Path(config.output_dir))[-1])


def test_a_disk_too_full_for_the_metrics_is_one_line(tiny: RunConfig, tmp_path: Path, small_disk: Path) -> None:
    """The whole run on one full disk: whatever meets it first says so, and nothing whole is lost."""
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    run = small_disk / "run"
    config = _with(tiny.model_copy(update={"output_dir": str(run)}), steps=3, checkpoint_every=1, eval_every=None)
    train(config, quiet=True)
    with (small_disk / "rest").open("wb", buffering=0) as rest, suppress(OSError):
        while True:
            rest.write(bytes(4096))
    with pytest.raises(UserError, match="No space left on device") as caught:
        train(_with(config, steps=1000), accept_changes=True, quiet=True)
    assert "\n" not in str(caught.value)
    (small_disk / "rest").unlink()
    verify(list_checkpoints(run)[-1])
    train(_with(config, steps=5), accept_changes=True, quiet=True)
    assert [record[0] for record in losses(run)] == [1, 2, 3, 4, 5]


def test_a_read_only_folder_is_one_line(tiny: RunConfig, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"step_00000003: cannot be written \(Read-only file system") as caught:
        train(tiny, quiet=True)
    assert "\n" not in str(caught.value) and "there is no other one" in str(caught.value)


def test_a_save_that_fails_in_our_own_code_is_not_hidden(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(save, "write_checkpoint", broken)
    with pytest.raises(ZeroDivisionError):
        train(_with(tiny, checkpoint_every=3), quiet=True)


def test_an_old_checkpoint_that_stays_is_only_said(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(save, "remove", refuse)
    with caplog.at_level(logging.WARNING):
        train(_with(tiny, checkpoint_every=1, keep_last=1), quiet=True)
    assert "cannot be removed (Permission denied)" in caplog.text
    assert _steps(tiny) == list(range(1, 9))


def test_the_copy_is_of_the_moment_of_the_save(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However slowly it is made: the optimizer waits. A copy taken across an update would mix two steps."""
    straight = tiny.model_copy(update={"output_dir": str(tmp_path / "straight")})
    every = {"checkpoint_every": 1, "keep_last": 8}
    train(_with(straight, **every, async_save=False), quiet=True)
    copy = Staging.copy

    def slowly(staging: Staging, tensors: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        threading.Event().wait(0.2)
        return copy(staging, tensors, **kwargs)

    monkeypatch.setattr(Staging, "copy", slowly)
    train(_with(tiny, **every), quiet=True)
    for a, b in zip(*(list_checkpoints(Path(c.output_dir)) for c in (tiny, straight)), strict=True):
        assert_same_tensors(a, b)
    monkeypatch.setattr(save.Saver, "_before_update", lambda saver: None)
    torn = tiny.model_copy(update={"output_dir": str(tmp_path / "torn")})
    train(_with(torn, **every), quiet=True)
    with pytest.raises(AssertionError):
        for a, b in zip(*(list_checkpoints(Path(c.output_dir)) for c in (torn, straight)), strict=True):
            assert_same_tensors(a, b)
