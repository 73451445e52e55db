"""Native checkpoints of real DeepSpeed engines, read and written, over stages and topologies."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from distributed.grid import Case
from distributed.native import SAVED, go_on, save, save_foreign
from distributed.pool import run_job
from runs import tensors
from sisa_dist.convert.deepspeed_read import is_deepspeed, open_deepspeed
from sisa_dist.convert.deepspeed_write import write_deepspeed


def zero(case: Case, layout: str, stage: int, **own: object) -> Case:
    engine = (("kind", "deepspeed"), ("zero_stage", stage), ("deepspeed_config", {"zero_optimization": own}))
    return dataclasses.replace(case, layout=layout, engine=engine)


SISA = Case("tp1", "sisa", 1, "heterogeneous", "fp32", qk_norm=True, tied=False)  # kv head held whole under tp
ATTENTION = Case("tp1", "attention", 4, "heterogeneous", "fp32")  # and a layer of sisa
NEOX = Case("tp1", "attention", 4, "uniform", "fp32", style="neox")  # biases, also behind row layers
# What is saved, and what it is written for.
FAST = {
    "zero3-tp2_dp2": (zero(SISA, "tp2_dp2", 3), [zero(SISA, "tp2_dp2", 3), zero(SISA, "dp4", 2)]),
    "zero1-dp2": (
        zero(ATTENTION, "dp2", 1),
        [zero(ATTENTION, "dp2", 1), zero(ATTENTION, "dp2", 3, sub_group_size=1536)],
    ),
    "zero0-tp2": (zero(SISA, "tp2", 0), [zero(SISA, "tp2", 0), zero(SISA, "tp2", 3)]),
    "zero3-tp2-neox": (zero(NEOX, "tp2", 3), [zero(NEOX, "tp2", 1)]),
}
SLOW = {"zero2-tp2_dp2": (zero(SISA, "tp2_dp2", 2), [zero(SISA, "tp2_dp2", 2), zero(SISA, "tp4", 1)])}
ALL = [
    (zero(base, layout, stage), [zero(base, layout, stage), *(zero(base, *other) for other in OTHERS)])
    for base in (SISA, dataclasses.replace(ATTENTION, n_kv_heads=2, d_s="uniform"))  # and one without any λ
    for layout in ("dp2", "tp2", "tp2_dp2_sp", "dp4")
    for stage in range(4)
    for OTHERS in [[("tp2_dp2", (stage + 1) % 4), ("dp4", (stage + 2) % 4), ("tp4_sp", (stage + 3) % 4)]]
]


def check(saved: Case, written: list[Case], folder: Path) -> None:
    run_job(saved.world_size, save, saved, folder)
    model = saved.config().model
    source = open_deepspeed(folder / "native", model=model)
    want = tensors(folder / "own")
    assert source.specs.keys() == want.keys() and len(want) >= 60
    assert source.step == SAVED and source.stage == saved.zero_stage and not source.notes
    assert [name for name in want if not torch.equal(source.read(name), want[name])] == []
    if source.tp == 1 and source.stage:
        equals_zero_to_fp32(folder / "native")
    for number, case in enumerate(written):
        config = case.config()
        native = folder / f"written{number}"
        said: list[str] = []
        topology = dict(stage=case.zero_stage, dp=case.world_size // config.parallel.tp, tp=config.parallel.tp)
        write_deepspeed(source, native, config=config, step=source.step, progress=said.append, **topology)
        assert set(want) <= set(said)
        again = open_deepspeed(native, model=None)  # the model is in client_state
        assert (again.stage, again.dp, again.tp) == tuple(topology.values()) and again.step == SAVED
        assert again.config_text is not None
        assert [name for name in want if not torch.equal(again.read(name), want[name])] == []
        if again.tp == 1 and again.stage:
            equals_zero_to_fp32(native)
        for own, theirs, different in run_job(case.world_size, go_on, case, folder / "own", native):
            assert theirs == own and not different, (case, own, theirs, different)


def equals_zero_to_fp32(native: Path) -> None:
    """DeepSpeed's own reader, which is not ours, sees what we see."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    source = open_deepspeed(native, model=None)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(native))
    ours = {name.removeprefix("model."): name for name in source.specs if name.startswith("model.")}
    assert theirs.keys() >= ours.keys() and all(name in ours or name == "out.weight" for name in theirs)
    assert [name for name in ours if not torch.equal(source.read(ours[name]).float(), theirs[name])] == []


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_native_checkpoints_are_read_and_written_to_the_bit(name: str, tmp_path: Path) -> None:
    saved, written = (FAST | SLOW)[name]
    check(saved, written, tmp_path)


def _id(value: object) -> str:
    return f"zero{value.zero_stage}-{value}" if isinstance(value, Case) else ""


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "written"), ALL, ids=_id)
def test_every_stage_and_topology(saved: Case, written: list[Case], tmp_path: Path) -> None:
    check(saved, written, tmp_path)


@pytest.mark.parametrize(("stage", "dtype"), [(0, None), (1, "bf16"), (2, None), (2, "fp16"), (3, "bf16")])
def test_another_model_of_deepspeed_alone(stage: int, dtype: str | None, tmp_path: Path) -> None:
    """Tied, frozen, a buffer, DeepSpeed's own bf16 and fp16: masters and moments as DeepSpeed itself hands them out."""
    truth = run_job(2, save_foreign, stage, tmp_path, dtype)[0]
    assert is_deepspeed(tmp_path)
    source = open_deepspeed(tmp_path, model=None)
    assert (source.dp, source.tp, source.step) == (2, 1, 2) and bool(source.notes) == (
        stage == 0
    )  # whose moments are numbered
    assert set(source.specs) == {*truth, "model.frozen.weight", "model.frozen.bias", "model.scale"}
    assert [name for name in truth if not torch.equal(source.read(name), truth[name])] == []
    scale = source.read("model.scale")
    assert torch.equal(scale, torch.linspace(0.5, 1.5, 7).to(scale.dtype))
    assert source.read("model.frozen.weight").shape == (7, 7)
    if stage > 1:  # zero_to_fp32 refuses that bf16 optimizer's files
        equals_zero_to_fp32(tmp_path)
