"""kill -9 at random instants while checkpoints are written: the newest is always whole, and the run goes on from it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

import sisa_dist
from distributed.launched import exit_codes, start_ranks, wait_for
from runs import losses
from sisa_dist.checkpoint import list_checkpoints, read_state, verify
from sisa_dist.config import RunConfig
from sisa_dist.training.trainer import train

RANKS = 2


def _train(config: RunConfig) -> None:
    train(config, quiet=True)


def _endless(config: RunConfig, folder: Path) -> RunConfig:
    training = {
        "steps": 100_000,
        "micro_batch_size": 1,
        "eval_every": None,
        "checkpoint_every": 1,
        "timeout_minutes": 0.5,
    }
    update = {"output_dir": str(folder), "training": config.training.model_copy(update=training)}
    return config.model_copy(update=update)


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_leaves_a_whole_newest_checkpoint(tiny: RunConfig, tmp_path: Path, kills: int) -> None:
    config, run = _endless(tiny, tmp_path / "run"), tmp_path / "run"
    random_ = random.Random(0)
    cut_short, reached = 0, 0
    for kill in range(kills):
        ranks = start_ranks(_train, RANKS, tmp_path / f"ranks{kill}", config)
        before = reached
        wait_for(lambda before=before: any(int(c.name[5:]) > before for c in list_checkpoints(run)))
        time.sleep(random_.random() * 0.3)
        victim = ranks[random_.randrange(RANKS)].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        exit_codes(ranks, timeout=30)
        cut_short += bool(list((run / "checkpoints").glob(".step_*.tmp")))
        newest = list_checkpoints(run)[-1]
        verify(newest)
        sisa_dist.load_model(newest)
        assert read_state(newest).step > before, "the run went on from the kill before"
        reached = read_state(newest).step
    assert cut_short >= kills // 10, "the kills did not meet saves"
    steps = [record[0] for record in losses(run)]
    assert steps == list(range(1, steps[-1] + 1))
