"""The settings that help most: how they are ranked, and that real estimates find the one that makes a run fit."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from distributed.pretending import alone
from hand_made import ROUND, made_estimate
from sisa_dist.config import RunConfig, UserError, load_config
from sisa_dist.training.advice import advise, single_changes
from sisa_dist.training.changes import arguments, changed, differences
from sisa_dist.training.devices import DEVICES, Device
from sisa_dist.training.outlook import Outlook, bytes_on, outlook
from sisa_dist.training.roofline import of_times

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = ["model.n_layers=2", "model.vocab_size=2048", "training.micro_batch_size=1", "training.global_batch_tokens=512"]


def _config(*overrides: str) -> RunConfig:
    return load_config(QUICKSTART, [*SMALL, *overrides])


def _supposed(config: RunConfig, device: Device, *, world_size: int) -> Outlook:
    """900 bytes in 9 s; with checkpointing a third of them and 3 s more; bf16 halves the time, tp the bytes."""
    peak, seconds = 900 // config.parallel.tp, 9.0
    if config.engine.activation_checkpointing:
        peak, seconds = peak // 3, seconds + 3.0
    if config.engine.cpu_offload:
        peak, seconds = peak // 9, seconds + 20.0
    if config.engine.precision == "bf16":
        seconds /= 2
    times = dict.fromkeys(("recomputation", "backward", "optimizer", "waited", "overlapped", "host"), 0.0)
    bound = of_times(times | {"forward": seconds}, config, made_estimate(), device)
    return Outlook(config, peak, bound, device.memory)


def _advised(memory: float, *overrides: str, world_size: int = 1) -> list[dict[str, Any]]:
    device = dataclasses.replace(ROUND, memory=memory)
    now = _supposed(_config(*overrides), device, world_size=world_size)
    helping = advise(now, device, world_size=world_size, look=_supposed)
    assert all(advice.saved == now.peak - advice.peak for advice in helping)
    return [advice.settings for advice in helping]


def test_a_run_that_fits_is_made_faster() -> None:
    assert _advised(1000) == [{"engine.precision": "bf16"}]
    assert _advised(1000, "engine.precision=bf16") == []  # as it is
    found = _advised(1000, "engine.activation_checkpointing=true", "engine.cpu_offload=true")
    offloaded = [
        {"engine.cpu_offload": False},
        {"engine.precision": "bf16"},
        {"engine.activation_checkpointing": False},
    ]
    assert found == offloaded
    # Without checkpointing it would be faster, and would no longer fit.
    assert _advised(500, "engine.activation_checkpointing=true") == [{"engine.precision": "bf16"}]


def test_a_run_that_does_not_fit_is_made_to() -> None:
    assert _advised(300) == [{"engine.activation_checkpointing": True}, {"engine.cpu_offload": True}]
    two = ["training.global_batch_tokens=1024"]
    assert _advised(500, *two, world_size=2)[0] == {"parallel.tp": 2}  # takes no longer
    dealt = _advised(500, *two, "parallel.dp=2", world_size=2)[0]
    assert dealt == {"parallel.tp": 2, "parallel.dp": 1}  # what a setting drags along is told with it


def test_where_nothing_fits_the_smallest_peaks_are_told() -> None:
    assert _advised(10) == [{"engine.cpu_offload": True}, {"engine.activation_checkpointing": True}]


def test_where_memory_is_the_hosts_nothing_is_moved_there() -> None:
    config = _config("engine.activation_checkpointing=true")
    for is_host, offloads in ((False, {"engine.cpu_offload", "engine.activation_offload"}), (True, set())):
        device = dataclasses.replace(ROUND, is_host=is_host)
        tried = {key for change in single_changes(config, device, world_size=1, fits=False) for key in change}
        assert {key for key in tried if key.endswith("offload")} == offloads
    assert bytes_on(device, made_estimate(peak=5, host=7)) == 12
    assert bytes_on(ROUND, made_estimate(peak=5, host=7)) == 5


def test_changes_drop_what_they_leave_without_effect() -> None:
    given = ["engine.kind=deepspeed", "engine.zero_stage=2"]
    config = _config(*given, "engine.deepspeed_config={zero_optimization: {reduce_bucket_size: 7}}")
    other = changed(config, {"engine.kind": "fsdp2"})
    assert other.engine.deepspeed_config == {} and other.engine.zero_stage == 3
    said = differences(config, other)
    assert said == {"engine.kind": "fsdp2", "engine.zero_stage": 3, "engine.deepspeed_config": {}}
    told = arguments(said)
    assert told == "--set engine.kind=fsdp2 --set engine.zero_stage=3 --set 'engine.deepspeed_config={}'"
    overrides = [part for part in shlex.split(told) if part != "--set"]
    assert load_config(QUICKSTART, [*SMALL, *given, *overrides]) == other  # as the command line would have it
    own = {"reduce_bucket_size": 7, "stage3_max_live_parameters": 9, "offload_optimizer": {"device": "cpu"}}
    third = changed(config, {"engine.zero_stage": 3, "engine.deepspeed_config": {"zero_optimization": own}})
    assert third.engine.deepspeed_config["zero_optimization"] == own
    first = changed(third, {"engine.zero_stage": 1})  # what is of another stage goes, and no more
    assert first.engine.deepspeed_config == {"zero_optimization": {"reduce_bucket_size": 7}}
    back = changed(_config("engine.prefetch=2"), {"engine.kind": "deepspeed", "engine.zero_stage": 1})
    assert back.engine.prefetch == 0
    wide = _config("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2", "parallel.cp_kind=ring")
    narrow = changed(wide, {"parallel.tp": 1, "parallel.cp": 1})
    assert (narrow.parallel.sequence_parallel, narrow.parallel.cp_kind) == (False, "all_gather")
    stored = _config("engine.activation_checkpointing=true", "engine.activation_offload=true")
    assert not changed(stored, {"engine.activation_checkpointing": False}).engine.activation_offload
    assert arguments({}) == "as it is" and arguments({"a.b": None}, prefix="stages.x.") == "--set stages.x.a.b=null"
    with pytest.raises(UserError, match=r"^training: global_batch_tokens"):
        changed(config, {"training.micro_batch_size": 3})


TINY = ["model.d_model=32", "model.n_heads=2", "model.d_ff=80", "model.vocab_size=128", "training.seq_len=64"]


def _rescued() -> tuple[Outlook, list[Any]]:
    config = _config(*TINY, "training.micro_batch_size=32", "training.global_batch_tokens=2048")
    h100 = DEVICES["h100"]
    sizes = [
        outlook(changed(config, {"engine.activation_checkpointing": on}), h100, world_size=1).peak
        for on in (False, True)
    ]
    tiny = dataclasses.replace(h100, memory=sum(sizes) / 2)
    now = outlook(config, tiny, world_size=1)
    return now, advise(now, tiny, world_size=1, best=9)


def test_real_estimates_find_what_makes_a_run_fit() -> None:
    now, helping = alone(_rescued)
    assert not now.fits
    assert helping and all(advice.fits for advice in helping)
    found = {key: advice for advice in helping for key in advice.settings}
    assert found["engine.activation_checkpointing"].faster < 0 < found["engine.activation_checkpointing"].saved
    assert [advice.seconds for advice in helping] == sorted(advice.seconds for advice in helping)
