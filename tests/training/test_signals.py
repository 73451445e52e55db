"""SIGTERM or SIGUSR1, to one rank, at any moment: a checkpoint, code 75, and a resumed run equal to an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.launched import exit_codes, said, start_ranks, wait_for
from distributed.ranks import run_ranks
from runs import assert_same_tensors, losses
from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.config import RunConfig, dump_config
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.signals import REQUEUE, Requeue, StopRequest
from sisa_dist.training.trainer import train


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def changed(config: RunConfig, folder: Path, **training: object) -> RunConfig:
    update = {"output_dir": str(folder), "training": config.training.model_copy(update=training)}
    return config.model_copy(update=update)


def _train(config: RunConfig) -> None:
    train(config, quiet=True)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same_runs(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    first, second = read_metrics(a), read_metrics(b)
    assert first["evaluation"] == second["evaluation"] and first["layers"] == second["layers"]
    assert_same_tensors(list_checkpoints(a)[-1], list_checkpoints(b)[-1])


@pytest.mark.parametrize(
    ("world_size", "trials"),
    [
        (2, 1),
        pytest.param(1, 20, marks=pytest.mark.slow),
        pytest.param(2, 20, marks=pytest.mark.slow),
    ],
)
def test_a_request_at_a_random_moment_saves_and_asks_to_be_requeued(
    tiny: RunConfig, tmp_path: Path, world_size: int, trials: int
) -> None:
    """`trials` of `trials`: every rank ends with the code, the checkpoint is of the last step, nothing is lost."""
    settings = {"steps": 16 * trials, "micro_batch_size": 1, "eval_every": 5, "checkpoint_every": 7}
    straight, broken = changed(tiny, tmp_path / "a", **settings), changed(tiny, tmp_path / "b", **settings)
    run_ranks(_train, world_size, tmp_path / "ranks", straight)
    rng = random.Random(trials + world_size)
    metrics, stopped = tmp_path / "b" / "metrics.jsonl", 0
    while stopped < trials:
        before = _lines(metrics) + rng.randrange(4)
        folder = tmp_path / f"trial{stopped}"
        ranks = start_ranks(_train, world_size, folder, broken)
        wait_for(lambda before=before: _lines(metrics) > before)
        time.sleep(rng.uniform(0, 0.03))  # in a step, an evaluation or a save
        pid = ranks[rng.randrange(world_size)].pid
        assert pid is not None
        os.kill(pid, rng.choice((signal.SIGTERM, signal.SIGUSR1)))
        assert exit_codes(ranks) == [REQUEUE] * world_size, said(folder, 0)
        stopped += 1
        assert read_state(list_checkpoints(tmp_path / "b")[-1]).step == losses(tmp_path / "b")[-1][0]
        assert list((tmp_path / "b" / "heartbeats").iterdir()) == []
    assert losses(tmp_path / "b")[-1][0] < 16 * trials, "the last signal came while it trained"
    run_ranks(_train, world_size, tmp_path / "rest", broken)
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_the_command_exits_with_the_requeue_code(tiny: RunConfig, tmp_path: Path) -> None:
    config = changed(tiny, tmp_path / "run", steps=100_000)
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "sisa_dist.cli", "train", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and "step" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == REQUEUE == 75
    assert "asked to stop by SIGTERM: saved" in out and "Traceback" not in err
    assert len(list_checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("steps", [8, 4], ids=["on the way", "after the last step"])
def test_an_evaluation_is_cut_short_and_done_again(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    settings = {"steps": steps, "eval_windows": 8}
    straight, broken = changed(tiny, tmp_path / "a", **settings), changed(tiny, tmp_path / "b", **settings)
    train(straight, quiet=True)
    real, calls = FSDP2Engine.score, 0

    def score(engine: FSDP2Engine, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(engine, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Requeue, match=r"step 4: asked to stop by SIGUSR1") as caught:
        patch.setattr(FSDP2Engine, "score", score)
        train(broken, quiet=True)
    assert caught.value.code == 75 and calls == 2, "of four batches"
    (saved,) = list_checkpoints(tmp_path / "b")[-1:]
    assert (read_state(saved).step, read_state(saved).evaluation_due) == (4, True)
    assert "evaluation" not in read_metrics(tmp_path / "b")
    train(broken, quiet=True)
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_handlers_are_put_back_unless_a_signal_came() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) != before and not stop
    assert signal.getsignal(signal.SIGTERM) == before
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop and stop.why == "SIGTERM"
    # A launcher's second SIGTERM, to a process that is leaving, does not change its code.
    os.kill(os.getpid(), signal.SIGTERM)
