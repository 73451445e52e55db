"""A run of learned d_s: to the bit after a resume, on other ranks, its gates logged, and hard at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.pool import run_job
from runs import assert_same_tensors, losses, tensors
from sisa_dist.checkpoint import list_checkpoints, load_model
from sisa_dist.config import RunConfig, load_config, load_run, parse_config
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.trainer import train

ZERO1, ZERO3 = ({"engine": {"kind": "deepspeed", "zero_stage": stage}} for stage in (1, 3))


def learning(tiny: RunConfig, folder: Path, **sections: Any) -> RunConfig:
    """Six steps: the target falls in the first three, the last is hard; a checkpoint after two and after four."""
    tree = tiny.model_dump()
    tree["model"] |= {"mixer": ["sisa", "attention"], "d_s": {"learned": True, "max": 8, "budget": 4.0}}
    tree["training"] |= {"steps": 6, "checkpoint_every": 2, "keep_last": 3, "micro_batch_size": 1}
    tree["logging"] |= {"every": 2}
    tree["optimizer"] |= {"gate_lr_ratio": 100.0}
    tree["output_dir"] = str(folder)
    return parse_config(tree | sections, source="test")


@pytest.fixture
def straight(tiny: RunConfig, tmp_path: Path) -> Path:
    train(learning(tiny, tmp_path / "straight"), quiet=True)
    return tmp_path / "straight"


def test_a_run_resumes_to_the_bit_and_its_gates_with_it(tiny: RunConfig, tmp_path: Path, straight: Path) -> None:
    for number in (0, 1):
        start = {"resume": str(list_checkpoints(straight)[number])}
        train(learning(tiny, tmp_path / f"again{number}", start=start), quiet=True)
        again = tmp_path / f"again{number}"
        assert_same_tensors(list_checkpoints(straight)[-1], list_checkpoints(again)[-1])
        assert losses(again) == losses(straight)[2 * number + 2 :]
        assert read_metrics(again)["d_s"] == read_metrics(straight)["d_s"][number + 1 :]
    first, last = (tensors(list_checkpoints(straight)[number]) for number in (0, -1))
    assert not torch.equal(first["model.gates.log_alpha"], last["model.gates.log_alpha"])
    assert last["model.gates.step"] == 6 and last["model.gates.share"] == 1


def test_gates_are_logged_and_hard_at_the_end(straight: Path) -> None:
    records = read_metrics(straight)["d_s"]
    assert [record["step"] for record in records] == [2, 4, 6]
    for record in records:
        assert record["layers"] == [0] and 0 < record["expected"][0] <= 8
    assert records[-1]["d_s"] == [4.0] and records[-1]["share"] == 1.0
    model, _ = load_model(straight)
    assert model.gates is not None
    z_LP = model.gates.values()
    assert z_LP.shape == (1, 4) and z_LP.sum() == 2 and ((z_LP == 0) | (z_LP == 1)).all()


def test_a_longer_run_leaves_hard_gates_hard(tiny: RunConfig, tmp_path: Path, straight: Path) -> None:
    longer = learning(tiny, tmp_path / "longer", start={"resume": str(list_checkpoints(straight)[-1])})
    training = longer.training.model_copy(update={"steps": 12})
    train(longer.model_copy(update={"training": training}), accept_changes=True, quiet=True)
    assert tensors(list_checkpoints(tmp_path / "longer")[-1])["model.gates.share"] == 1
    assert read_metrics(tmp_path / "longer")["d_s"][0]["share"] == 1.0


def test_weights_of_a_run_begin_with_gates_anew_unless_they_are_hard(
    tiny: RunConfig, tmp_path: Path, straight: Path
) -> None:
    half, whole = list_checkpoints(straight)[0], list_checkpoints(straight)[-1]
    for source, share in ((half, [1 / 6, 0.5, 5 / 6]), (whole, [1.0, 1.0, 1.0])):
        new = tmp_path / source.name
        train(learning(tiny, new, start={"weights": str(source)}, logging={"every": 1}), quiet=True)
        found = read_metrics(new)["d_s"]
        assert [record["share"] for record in found[::2]] == pytest.approx(share)
    before, after = (tensors(list_checkpoints(run)[-1])["model.gates.log_alpha"] for run in (straight, new))
    assert torch.equal(before, after), "hard gates stand"


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_hard_gates_stand_although_momentum_goes_on(tiny: RunConfig, tmp_path: Path, world_size: int) -> None:
    """The last step is hard, and the steps before it were not."""
    engine = {"engine": {"kind": "deepspeed", "zero_stage": 3}} if world_size > 1 else {}
    config = learning(tiny, tmp_path / "run", **engine)
    training = {"steps": 10, "checkpoint_every": 1, "keep_last": 3}
    config = config.model_copy(update={"training": config.training.model_copy(update=training)})
    run_job(world_size, _train_on, config)
    seen = [tensors(path)["model.gates.log_alpha"] for path in list_checkpoints(tmp_path / "run")]
    moments = tensors(list_checkpoints(tmp_path / "run")[-1])["exp_avg.gates.log_alpha"]
    assert (
        len(seen) == 3 and moments.abs().max() > 0 and torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    )


def test_stages_have_one_schedule_of_gates(tiny: RunConfig, tmp_path: Path) -> None:
    tree = learning(tiny, tmp_path / "run").model_dump(exclude_unset=True)
    del tree["training"]["steps"]
    tree["stages"] = [{"name": "a", "steps": 2}, {"name": "b", "steps": 4, "optimizer": {"lr": 1e-3}}]
    path = tmp_path / "stages.yaml"
    path.write_text(json.dumps(tree))
    run = load_run(path)
    assert [stage.config.model.learned_d_s.steps for stage in run.stages] == [6, 6]  # type: ignore[union-attr]
    train(run, quiet=True)
    assert read_metrics(tmp_path / "run")["d_s"][0]["share"] == pytest.approx(1 / 3)
    assert tensors(list_checkpoints(tmp_path / "run")[-1])["model.gates.share"] == 1


def test_a_run_made_fixed_goes_on_as_a_new_one(tiny: RunConfig, tmp_path: Path, straight: Path) -> None:
    fixed = tmp_path / "fixed"
    for _ in convert(plan(straight, to="native", materialise="to_mlp"), fixed):
        pass
    overrides = [f"start.weights={fixed}", f"output_dir={tmp_path / 'on'}"]
    train(load_config(fixed / "config.yaml", overrides), quiet=True)
    model, _ = load_model(tmp_path / "on")
    assert model.gates is None and model.config.layer_d_s == [8, 0] and "d_s" not in read_metrics(tmp_path / "on")
    (_, first, *_), *_, (_, last, *_) = losses(tmp_path / "on")
    assert first < losses(straight)[0][1] and last < first


def _train_on(config: RunConfig) -> None:
    train(config, quiet=True)


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
        pytest.param(2, {"parallel": {"dp": 2}, **ZERO3}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel": {"tp": 2, "dp": 2}, **ZERO1}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel": {"dp": 4, "dp_replicate": 2}}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel": {"cp": 2, "tp": 2}}, marks=pytest.mark.slow),
        pytest.param(
            2,
            {"parallel": {"dp": 2}, "engine": {"activation_checkpointing": True, "cpu_offload": True}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_goes_on_in_any_layout(
    tiny: RunConfig, tmp_path: Path, straight: Path, world_size: int, sections: dict[str, Any]
) -> None:
    start = {"resume": str(list_checkpoints(straight)[0])}
    run_job(world_size, _train_on, learning(tiny, tmp_path / "run", start=start, **sections))
    want, got = (tensors(list_checkpoints(run)[-1]) for run in (straight, tmp_path / "run"))
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-5, msg=name)
    assert read_metrics(tmp_path / "run")["d_s"][-1]["d_s"] == [4.0]
