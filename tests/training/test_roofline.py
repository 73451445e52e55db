"""The roofline against arithmetic by hand: which wires a group has, what hides behind what, what a run costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hand_made import ROUND, made_estimate
from sisa_dist.config import RunConfig, RunStage, UserError, load_config, load_run
from sisa_dist.training import devices
from sisa_dist.training.cost import cost_of
from sisa_dist.training.devices import DEVICES, device_named, measure_here, peak_flops
from sisa_dist.training.roofline import Roofline, roofline, transfer_seconds
from sisa_dist.training.traffic import Transfer
from sisa_dist.training.work import Work

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def _config(*overrides: str) -> RunConfig:
    return load_config(QUICKSTART, overrides)


def _bound(*overrides: str, **known: Any) -> Roofline:
    return roofline(_config(*overrides), made_estimate(**known), ROUND)


# (collective, size, stride), world, seconds of 16 bytes: link 8 and network 1 a rank, hosts of eight
WIRES = {
    "inside a host": (("all_gather", 8, 1), 16, 16 * 7 / 8 / 8),
    "every rank of two hosts: eight cards": (("all_gather", 16, 1), 16, 16 * 15 / 16 / 8),
    "behind tp 2 over two hosts: four cards": (("reduce_scatter", 8, 2), 16, 16 * 7 / 8 / 4),
    "copies of eight shards: one card": (("all_reduce", 2, 8), 16, 2 * 16 / 2 / 1),
    "of four hosts, two ranks on each": (("all_reduce", 8, 4), 32, 2 * 16 * 7 / 8 / 2),
    "tp 3 does not divide a host: two ranks here, one there": (("all_reduce", 3, 1), 24, 2 * 16 * 2 / 3 / 1),
    "tp 3 on one host": (("all_reduce", 2, 3), 6, 2 * 16 / 2 / 8),
    "each sends half of it to the other host": (("all_to_all", 16, 1), 16, 16 / 2 / 1),
    "all of it inside": (("all_to_all", 4, 1), 16, 16 * 3 / 4 / 8),
    "the next rank is on another host": (("send", 16, 1), 16, 16 / 1),
    "the next rank is beside it": (("send", 4, 1), 16, 16 / 8),
}


@pytest.mark.parametrize("name", WIRES)
def test_which_wires_a_group_has(name: str) -> None:
    (collective, size, stride), world, seconds = WIRES[name]
    transfer = Transfer(collective, "dp_shard", size, stride, 1, 16)  # type: ignore[arg-type]
    assert transfer_seconds(transfer, ROUND, world) == pytest.approx(seconds)


def test_a_card_for_each_rank_is_no_faster_than_the_link() -> None:
    h100 = DEVICES["h100"]
    transfer = Transfer("all_gather", "dp_shard", 16, 1, 1, 16_000_000_000)
    assert transfer_seconds(transfer, h100, 16) == pytest.approx(15e9 / 400e9)
    inside = Transfer("all_gather", "dp_shard", 8, 1, 1, 16_000_000_000)
    assert transfer_seconds(inside, h100, 16) == pytest.approx(14e9 / 450e9)


def test_an_operator_takes_what_its_flops_or_its_bytes_ask() -> None:
    work = [
        Work("forward", "aten::mm", "bfloat16", 3, 200.0, 10),  # 2 s each, 1 of memory
        Work("forward", "aten::mul", "bfloat16", 2, 0.0, 30),  # 3 s each
        Work("recomputation", "aten::mm", "float32", 1, 50.0, 20),  # 5 s, 2 of memory
        Work("backward", "aten::mm", "bfloat16", 1, 100.0, 40),  # 1 s, 4 of memory
        Work("optimizer", "aten::_fused_adamw_", "float32", 1, 0.0, 20),
    ]
    found = _bound("engine.precision=bf16", work=work)
    assert found.parts == {
        "forward": 12.0, "recomputation": 5.0, "backward": 4.0, "optimizer": 2.0, "waited": 0, "exposed": 0, "host": 0
    }  # fmt: skip
    assert found.seconds == 23.0 and found.tokens_per_second == pytest.approx(10 / 23)
    assert found.tokens_per_day == pytest.approx(86400 * 10 / 23)
    assert found.mfu == pytest.approx(60 / (23 * 100))
    assert _bound(work=work).mfu == pytest.approx(60 / (23 * 10))  # in fp32 it is of the fp32 ceiling


BESIDE = [Work("forward", "aten::mm", "bfloat16", 1, 100.0, 0), Work("backward", "aten::mm", "bfloat16", 1, 200.0, 0)]
AFTER = Work("optimizer", "aten::mul", "float32", 1, 0.0, 50)
GATHER = Transfer("all_gather", "dp_shard", 8, 1, 4, 64)  # 7 s
SCATTER = Transfer("reduce_scatter", "dp_shard", 8, 1, 4, 16)  # 1.75 s
OF_TP = Transfer("all_reduce", "tp", 2, 1, 9, 32)  # 4 s


def _exposed(*overrides: str, traffic: list[Transfer]) -> tuple[float, float, float]:
    mesh = {"dp_shard": 8}
    found = _bound("engine.precision=bf16", *overrides, work=[*BESIDE, AFTER], traffic=traffic, mesh=mesh)
    assert found.seconds == pytest.approx(3 + 5 + found.parts["waited"] + found.parts["exposed"])
    return found.parts["waited"], found.parts["exposed"], found.overlapped


def test_what_hides_behind_what() -> None:
    assert _exposed(traffic=[SCATTER]) == (0, 0, 1.75)  # of 3 s; the optimizer's 5 hide nothing
    assert _exposed(traffic=[SCATTER, GATHER]) == pytest.approx((0, 8.75 - 3, 8.75))
    assert _exposed(traffic=[SCATTER, OF_TP]) == (4, 0, 1.75)
    for axis in ("cp", "ep", "world"):
        assert _exposed(traffic=[Transfer("all_reduce", axis, 2, 1, 1, 32)]) == (4, 0, 0)  # type: ignore[arg-type]
    of_copies = Transfer("all_reduce", "dp_replicate", 2, 1, 1, 8)
    assert _exposed(traffic=[of_copies]) == (0, 0, 1)


def test_what_zeros_stages_wait_for() -> None:
    zero = ("engine.kind=deepspeed", "engine.zero_stage={}")
    stages = {stage: [part.format(stage) for part in zero] for stage in range(4)}
    assert _exposed(*stages[3], traffic=[GATHER, SCATTER]) == pytest.approx((0, 5.75, 8.75))
    assert _exposed(*stages[2], traffic=[GATHER, SCATTER]) == (7, 0, 1.75)
    assert _exposed(*stages[1], traffic=[GATHER, SCATTER]) == (7, 0, 1.75)
    forbidden = "engine.deepspeed_config={zero_optimization: {overlap_comm: false}}"
    assert _exposed(*stages[2], forbidden, traffic=[GATHER, SCATTER]) == (8.75, 0, 0)
    reduced = Transfer("all_reduce", "dp_shard", 8, 1, 1, 16)
    assert _exposed(*stages[0], traffic=[reduced]) == (3.5, 0, 0)


def test_gradients_of_many_micro_batches_hide_behind_the_last_backward() -> None:
    def exposed(micro_batches: int, *overrides: str, work: list[Work] = BESIDE, traffic: Transfer = SCATTER) -> float:
        known = {"work": work, "traffic": [traffic], "mesh": {"dp_shard": 8}, "micro_batches": micro_batches}
        return _bound("engine.precision=bf16", *overrides, **known).parts["exposed"]

    # 1.75 s of reductions; backwards of 2 s together, so the last of four has half a second.
    assert [exposed(number) for number in (1, 4)] == pytest.approx([0, 1.25])
    again = [*BESIDE, Work("recomputation", "aten::mm", "bfloat16", 1, 200.0, 0)]
    assert exposed(4, work=again) == pytest.approx(0.75)
    gathered = dataclasses.replace(GATHER, nbytes=16)  # in every micro-batch
    assert exposed(4, traffic=gathered) == 0
    zero = {stage: ("engine.kind=deepspeed", f"engine.zero_stage={stage}") for stage in (1, 2, 3)}
    summed = Transfer("all_reduce", "dp_shard", 8, 1, 4, 8)
    assert [exposed(4, *zero[stage], traffic=summed) for stage in zero] == pytest.approx([1.25, 0, 0])


def test_offloading_pays_the_link_and_the_hosts_memory() -> None:
    found = _bound("engine.cpu_offload=true", work=[AFTER], host_bytes_per_step=12)
    assert found.parts["host"] == 12 / 4 and found.parts["optimizer"] == 50 / 2


def test_a_cpu_computes_or_sends() -> None:
    alone = dataclasses.replace(ROUND, overlaps=False)
    found = roofline(_config(), made_estimate(work=BESIDE, traffic=[SCATTER], mesh={"dp_shard": 8}), alone)
    assert (found.parts["waited"], found.parts["exposed"]) == (1.75, 0)


def _step(seconds: float) -> Roofline:
    return Roofline({"forward": seconds}, 0.0, 1.0, 10, 1.0)


def test_what_a_run_costs() -> None:
    run = load_run(QUICKSTART, ["training.steps=7200"]).stages[0]
    found = cost_of(run, _step(2.0), ranks=8, price_per_hour=2.5)
    assert (found.steps, found.tokens) == (7200, 72000)
    assert found.days == pytest.approx(4 / 24) and found.device_hours == pytest.approx(32)
    assert found.price == pytest.approx(80)
    assert cost_of(run, _step(2.0), ranks=8).price is None


def test_a_stage_costs_its_own_steps() -> None:
    config = load_config(QUICKSTART, ["training.steps=250"])
    second = RunStage(config, number=2, name="long", first_step=200)
    assert cost_of(second, _step(36.0), ranks=2, price_per_hour=1.0).price == pytest.approx(50 * 36 / 3600 * 2)


@pytest.mark.parametrize(("told", "name"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb")])
def test_mfu_and_the_roofline_read_one_table(monkeypatch: pytest.MonkeyPatch, told: str, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: told)
    for dtype in (torch.float32, torch.bfloat16):
        expected = DEVICES[name].flops[str(dtype).removeprefix("torch.")]
        assert peak_flops(torch.device("cuda", 0), dtype) == expected
    assert DEVICES[name].flops["float32"] < DEVICES[name].flops["bfloat16"] / 10  # TF32 is off


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_named("H200") is DEVICES["h200"]
    with pytest.raises(UserError, match=r"--device h900 is not known: set one of a100-40gb, .*b200, or here"):
        device_named("h900")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_matmul", lambda device, dtype: 8.0 if dtype == torch.float32 else 16.0)
    monkeypatch.setattr(devices, "_best", lambda call, device: 1.0)
    alone, four = measure_here(1), measure_here(4)
    assert alone.flops == {"float32": 8.0, "bfloat16": 16.0} and four.flops == {"float32": 2.0, "bfloat16": 4.0}
    assert alone.bandwidth == 2 * 2**28 == 4 * four.bandwidth  # read and written
    assert four.link == four.bandwidth / 2 and not four.overlaps and "charged as copies" in four.measured
    assert alone.memory == 4 * four.memory > 2**28


def test_this_machine_is_measured() -> None:
    found = device_named("here")
    for flops in found.flops.values():
        assert 1e7 < flops < 1e16
    assert 1e8 < found.bandwidth < 1e14 and found.memory > 2**28 and "measured" in found.measured
