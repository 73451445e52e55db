"""A run with experts: resumes to the bit, the bias too, on other ranks; loads are logged, a collapse is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.pool import run_job
from runs import assert_same_tensors, losses, tensors
from sisa_dist.checkpoint import list_checkpoints, load_model
from sisa_dist.config import RunConfig, parse_config
from sisa_dist.engine.experts import ExpertLoad
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.reporter import Reporter
from sisa_dist.training.trainer import train

BIAS = "model.blocks.1.mlp.router.bias"


def mixed(tiny: RunConfig, folder: Path, **sections: Any) -> RunConfig:
    tree = tiny.model_dump()
    tree["model"] |= {"mlp": ["swiglu", "moe"], "moe": {"experts": 4, "d_ff": 16, "balance": "bias", "z_loss": 0.01}}
    tree["training"] |= {"steps": 4, "checkpoint_every": 2, "micro_batch_size": 1}
    tree["output_dir"] = str(folder)
    return parse_config(tree | sections, source="test")


def test_a_run_resumes_to_the_bit_and_its_bias_with_it(tiny: RunConfig, tmp_path: Path) -> None:
    straight = mixed(tiny, tmp_path / "straight")
    train(straight, quiet=True)
    first = list_checkpoints(tmp_path / "straight")[-1]
    again = mixed(tiny, tmp_path / "again", start={"resume": str(list_checkpoints(tmp_path / "straight")[0])})
    train(again, quiet=True)
    assert_same_tensors(first, list_checkpoints(tmp_path / "again")[-1])
    assert losses(tmp_path / "again") == losses(tmp_path / "straight")[2:]
    bias = tensors(first)[BIAS]
    assert bias.unique().numel() > 1 and (bias / 0.001 - (bias / 0.001).round()).abs().max() < 1e-3
    model, _ = load_model(tmp_path / "straight")
    assert torch.equal(model.blocks[1].mlp.router.bias, bias)  # type: ignore[union-attr, arg-type]


def test_loads_are_logged_and_count_every_choice(tiny: RunConfig, tmp_path: Path) -> None:
    config = mixed(tiny, tmp_path / "run", logging={"every": 2})
    train(config, quiet=True)
    records = read_metrics(tmp_path / "run")["experts"]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert record["layers"] == [1] and record["balance_loss"][0] >= 0.9 and record["z_loss"][0] > 0
        assert sum(record["counts"][0]) == 2 * 2 * config.training.global_batch_tokens


def test_a_collapse_is_one_line_that_names_layer_and_expert(tiny: RunConfig, tmp_path: Path) -> None:
    told: list[str] = []
    reporter = object.__new__(Reporter)
    reporter._balance = "bias"
    reporter._metrics = type("M", (), {"write": lambda *a, **k: None})()  # type: ignore[assignment]
    reporter._console = type("C", (), {"note": lambda self, step, text: told.append(text)})()  # type: ignore
    state: Any = type("S", (), {"step": 7})()
    reporter.experts(state, ExpertLoad([1, 3], [[100, 101], [9, 1000]], [1.0, 1.0], [0.0, 0.0]))
    assert told == []
    reporter.experts(state, ExpertLoad([1, 3], [[100, 101], [1000, 2]], [1.0, 1.0], [0.0, 0.0]))
    (line,) = told
    assert line.startswith("warning: expert 1 of layer 3 got 0.40% of its fair share") and "\n" not in line
    assert "raise model.moe.bias_rate, or lower" in line


def _train_on(config: RunConfig) -> None:
    train(config, quiet=True)


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        pytest.param(2, {"parallel": {"dp": 2}}, marks=pytest.mark.slow),
        (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
        (2, {"parallel": {"dp": 2, "ep": 2}}),
        pytest.param(4, {"parallel": {"dp": 4, "ep": 2}}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"parallel": {"dp": 4, "ep": 2}, "engine": {"kind": "deepspeed", "zero_stage": 2}},
            marks=pytest.mark.slow,
        ),
        (2, {"parallel": {"dp": 2}, "engine": {"kind": "deepspeed", "zero_stage": 3}}),
        pytest.param(
            2, {"parallel": {"dp": 2}, "engine": {"kind": "deepspeed", "zero_stage": 1}}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_checkpoint_goes_on_in_any_layout(
    tiny: RunConfig, tmp_path: Path, world_size: int, sections: dict[str, Any]
) -> None:
    straight = mixed(tiny, tmp_path / "straight")
    train(straight, quiet=True)
    start = {"resume": str(list_checkpoints(tmp_path / "straight")[0])}
    run_job(world_size, _train_on, mixed(tiny, tmp_path / "run", start=start, **sections))
    want, got = (tensors(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "run"))
    assert want.keys() == got.keys()
    torch.testing.assert_close(got[BIAS], want[BIAS], rtol=0, atol=1e-7)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_a_checkpoint_of_dealt_out_experts_goes_on_where_they_are_whole(tiny: RunConfig, tmp_path: Path) -> None:
    """Saved at ep 2 by either engine, continued by one process and at ep 4: names and shapes are those of ep 1."""
    straight = mixed(tiny, tmp_path / "straight")
    train(straight, quiet=True)
    want = tensors(list_checkpoints(tmp_path / "straight")[-1])
    for name, engine in (("fsdp2", {}), ("zero2", {"engine": {"kind": "deepspeed", "zero_stage": 2}})):
        run_job(4, _train_on, mixed(tiny, tmp_path / name, parallel={"dp": 4, "ep": 2}, **engine))
        start = {"resume": str(list_checkpoints(tmp_path / name)[0])}
        train(mixed(tiny, tmp_path / f"{name}_whole", start=start), quiet=True)
        run_job(4, _train_on, mixed(tiny, tmp_path / f"{name}_ep4", start=start, parallel={"dp": 4, "ep": 4}))
        for run in (name, f"{name}_whole", f"{name}_ep4"):
            got = tensors(list_checkpoints(tmp_path / run)[-1])
            assert want.keys() == got.keys()
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=0, atol=2e-5, msg=f"{run} {key}")
