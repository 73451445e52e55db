"""FSDP2 on two gloo processes equals one process, and resumes to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from distributed.ranks import run_ranks
from runs import assert_same_tensors, losses, tensors
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.config import ParallelConfig, RunConfig, UserError, dump_config
from sisa_dist.engine import Engine, StepResult, build_engine
from sisa_dist.parallel.mesh import Mesh, init_mesh
from sisa_dist.training import trainer
from sisa_dist.training.trainer import train


def _train(config: RunConfig, crash_at: int | None = None) -> None:
    """Trains; with crash_at, stops as a killed job does at the start of that step of this sitting."""
    if crash_at is None:
        train(config, quiet=True)
        return
    real, calls = trainer.build_engine, 0

    def build(config: RunConfig, mesh: Mesh) -> Engine:
        engine = real(config, mesh)
        step = engine.train_step

        def train_step(*args: object, **options: object) -> StepResult:
            nonlocal calls
            calls += 1
            if calls == crash_at:
                raise KeyboardInterrupt
            return step(*args, **options)  # type: ignore[arg-type]

        engine.train_step = train_step  # type: ignore[method-assign]
        return engine

    with mock.patch.object(trainer, "build_engine", build), pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)


def _initial(config: RunConfig) -> dict[str, torch.Tensor]:
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    return {n: _whole(t).clone() for n, t in engine.state_tensors().items() if n.startswith("model.")}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _with(config: RunConfig, folder: Path, **sections: dict) -> RunConfig:
    update: dict = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update | {"output_dir": str(folder)})


VARIANTS: dict[str, dict[str, dict]] = {
    "sisa": {},
    "attention_gqa": {"model": {"mixer": "attention", "d_s": None, "n_kv_heads": 1}},
    "checkpointed_mixed": {
        "model": {"mixer": ["sisa", "attention"], "d_s": [8, 0]},
        "engine": {"activation_checkpointing": True},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_equal_one(tiny: RunConfig, tmp_path: Path, name: str) -> None:
    sections = VARIANTS[name] | {"training": {"micro_batch_size": 1, "steps": 5}}
    one, two = _with(tiny, tmp_path / "one", **sections), _with(tiny, tmp_path / "two", **sections)
    train(one, quiet=True)
    run_ranks(_train, 2, tmp_path / "ranks", two)
    rows = list(zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True))
    assert len(rows) == 5
    for a, b in rows:
        assert a[0] == b[0] and a[3] == b[3]  # the same samples
        assert abs(a[1] - b[1]) < 1e-5 and abs(a[2] - b[2]) < 1e-5 * max(1.0, a[2])
    first, second = (tensors(list_checkpoints(tmp_path / run)[-1]) for run in ("one", "two"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        # Sums over the batch fall in another order; Adam turns tiny differences of near-zero gradients into steps,
        # so weights are held to a thousandth of what five steps at lr 2e-3 can move, moments to rounding.
        tolerance = 1e-5 if key.startswith("model.") else 1e-6
        assert (tensor - second[key]).abs().max() < tolerance, key
    moved = {k for k in first if k.startswith("model.") and (first[k] - _initial(one)[k]).abs().max() > 1e-5}
    assert len(moved) == sum(k.startswith("model.") for k in first)


def test_initial_weights_have_the_same_bits_on_two_processes(tiny: RunConfig, tmp_path: Path) -> None:
    one = _initial(tiny)
    for rank in run_ranks(_initial, 2, tmp_path, tiny):
        assert rank.keys() == one.keys()
        assert all(torch.equal(rank[name], one[name]) for name in one)


def test_resume_on_two_processes_is_bit_equal_and_moves_to_one(tiny: RunConfig, tmp_path: Path) -> None:
    sections = {"training": {"micro_batch_size": 1}}
    straight, broken = _with(tiny, tmp_path / "straight", **sections), _with(tiny, tmp_path / "broken", **sections)
    run_ranks(_train, 2, tmp_path / "a", straight)
    run_ranks(_train, 2, tmp_path / "b", broken, 5)
    assert [p.name for p in list_checkpoints(tmp_path / "broken")] == ["step_00000003"]
    run_ranks(_train, 2, tmp_path / "c", broken)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert_same_tensors(list_checkpoints(tmp_path / "broken")[-1], list_checkpoints(tmp_path / "straight")[-1])
    # The same run, its first half on two processes and the rest on one.
    moved = _with(tiny, tmp_path / "moved", **sections)
    run_ranks(_train, 2, tmp_path / "d", moved, 5)
    train(moved, quiet=True)
    for a, b in zip(losses(tmp_path / "moved"), losses(tmp_path / "straight"), strict=True):
        assert a[3] == b[3] and abs(a[1] - b[1]) < 1e-5


@pytest.mark.slow
def test_a_run_moves_between_tensor_parallel_layouts(tiny: RunConfig, tmp_path: Path) -> None:
    """Half of it at tp 2 × dp 2 with sequence parallelism, half on one process, either way round. In the fast suite
    test_resume_anywhere.py's."""
    sections = {"training": {"micro_batch_size": 1}}
    cut = {"parallel": ParallelConfig(tp=2, sequence_parallel=True).model_dump()}
    straight = _with(tiny, tmp_path / "straight", **sections)
    train(straight, quiet=True)
    there, back = _with(tiny, tmp_path / "there", **sections), _with(tiny, tmp_path / "back", **sections)
    run_ranks(_train, 4, tmp_path / "a", _with(there, tmp_path / "there", **cut), 5)
    train(there, quiet=True)
    _train(back, 5)
    run_ranks(_train, 4, tmp_path / "b", _with(back, tmp_path / "back", **cut))
    want = tensors(list_checkpoints(tmp_path / "straight")[-1])
    for run in ("there", "back"):
        for a, b in zip(losses(tmp_path / run), losses(tmp_path / "straight"), strict=True):
            assert a[3] == b[3] and abs(a[1] - b[1]) < 1e-5
        got = tensors(list_checkpoints(tmp_path / run)[-1])
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert got[key].shape == tensor.shape
            assert (got[key] - tensor).abs().max() < (1e-4 if key.startswith("model.") else 1e-6), key


def test_torchrun_trains(tiny: RunConfig, tmp_path: Path) -> None:
    config = _with(tiny, tmp_path / "run", training={"micro_batch_size": 1, "steps": 2, "eval_every": None})
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "sisa_dist.torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["sisa_dist.cli", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in losses(tmp_path / "run")] == [1, 2]


def test_a_wrong_layout_is_one_line(tiny: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parallel\.dp = 1 × 3 but 1 process"):
        train(_with(tiny, tmp_path / "x", parallel={"dp": 3}), quiet=True)
    uneven = _with(tiny, tmp_path / "y", training={"global_batch_tokens": 192, "micro_batch_size": 1})
    assert all("set it to 128 or 256" in said and "\n" not in said for said in run_ranks(_refused, 2, tmp_path, uneven))


def _refused(config: RunConfig) -> str:
    with pytest.raises(UserError) as refused:
        train(config, quiet=True)
    return str(refused.value)
