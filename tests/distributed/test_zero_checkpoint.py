"""Runs under DeepSpeed: the trainer, its checkpoints, and moving between engines and layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed.ranks import run_ranks
from distributed.test_fsdp import _train, _with
from runs import assert_same_tensors, losses, tensors
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.config import RunConfig
from sisa_dist.training.trainer import train

TP2 = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {  # ranks, stage, parallel
    "zero0-dp2": (2, 0, {}),
    "zero1-dp2": (2, 1, {}),
    "zero2-tp2_dp2_sp": (4, 2, TP2),
    "zero3-dp2": (2, 3, {}),
    "zero3-tp2_dp2_sp": (4, 3, TP2),
}


def _zero(config: RunConfig, folder: Path, stage: int, parallel: dict[str, Any]) -> RunConfig:
    return _with(config, folder, engine={"kind": "deepspeed", "zero_stage": stage}, parallel=parallel)


def _close(run: Path, straight: Path) -> None:
    for a, b in zip(losses(run), losses(straight), strict=True):
        assert a[3] == b[3] and abs(a[1] - b[1]) < 1e-5
    want, got = (tensors(list_checkpoints(folder)[-1]) for folder in (straight, run))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].shape == tensor.shape
        assert (got[key] - tensor).abs().max() < (1e-4 if key.startswith("model.") else 1e-6), key


FAST = ("zero3-dp2",)  # the others take half a minute each; test_resume_anywhere.py walks through them too


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_zero_resumes_to_the_bit(tiny: RunConfig, tmp_path: Path, name: str) -> None:
    ranks, stage, parallel = LAYOUTS[name]
    tiny = _with(tiny, tmp_path, training={"micro_batch_size": 1})
    plain = _with(tiny, tmp_path / "plain")
    train(plain, quiet=True)
    straight = _zero(tiny, tmp_path / "straight", stage, parallel)
    run_ranks(_train, ranks, tmp_path / "a", straight)
    _close(tmp_path / "straight", tmp_path / "plain")
    settings = json.loads((tmp_path / "straight" / "deepspeed.json").read_text(encoding="utf-8"))
    assert settings["zero_optimization"]["stage"] == stage
    broken = _zero(tiny, tmp_path / "broken", stage, parallel)
    run_ranks(_train, ranks, tmp_path / "b", broken, 5)
    run_ranks(_train, ranks, tmp_path / "c", broken)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert_same_tensors(list_checkpoints(tmp_path / "broken")[-1], list_checkpoints(tmp_path / "straight")[-1])


@pytest.mark.slow  # in the fast suite: test_resume_anywhere.py's moves and, by the trainer, test_expert_runs.py's
@pytest.mark.parametrize("name", LAYOUTS)
def test_zero_moves_to_one_process_and_back(tiny: RunConfig, tmp_path: Path, name: str) -> None:
    ranks, stage, parallel = LAYOUTS[name]
    tiny = _with(tiny, tmp_path, training={"micro_batch_size": 1})
    plain = _with(tiny, tmp_path / "plain")
    train(plain, quiet=True)
    there = _zero(tiny, tmp_path / "there", stage, parallel)
    run_ranks(_train, ranks, tmp_path / "d", there, 5)
    train(
        _with(
            there,
            tmp_path / "there",
            engine={"kind": "fsdp2", "zero_stage": 3},
            parallel={"tp": 1} | {"sequence_parallel": False},
        ),
        quiet=True,
    )
    _close(tmp_path / "there", tmp_path / "plain")
    back = _with(tiny, tmp_path / "back")
    _train(back, 5)
    run_ranks(_train, ranks, tmp_path / "e", _zero(back, tmp_path / "back", stage, parallel))
    _close(tmp_path / "back", tmp_path / "plain")
