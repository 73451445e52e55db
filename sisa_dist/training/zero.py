"""DeepSpeed's ZeRO in bytes: what each stage stores, and what it needs in a step beyond what the model needs.

DeepSpeed cannot be rehearsed on fake tensors, so its partitions and buffers are described here, as 0.19 has them and
on fp32 parameters, which is how our engine runs it. The model's own part of a step is rehearsed without any engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sisa_dist.config import RunConfig
from sisa_dist.engine.deepspeed_config import deepspeed_config
from sisa_dist.engine.optim import group_of
from sisa_dist.parallel.apply import Slice
from sisa_dist.training.memory_meter import MemoryMeter

FP32 = 4  # bytes


@dataclass(frozen=True)
class States:
    """Bytes of one rank. `gradients` as they stand at the optimizer's step; `moments` with Adam's step counts."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def zero_states(
    stage: int, shapes: Mapping[str, Sequence[int]], slices: Mapping[str, Slice], ranks: int, expert_ranks: int
) -> States:
    """Of any of `ranks` data ranks: partitions are padded, so all hold the same. `shapes` are a rank's slices; what ep
    dealt out is partitioned among `expert_ranks`."""
    whole = _whole(shapes)
    if stage == 0:
        return States(whole, whole, 2 * whole + FP32 * len(shapes))
    groups = optimizer_groups(shapes, slices)
    steps = FP32 * len(groups)  # a group is one flat tensor to the optimizer
    if stage == 3:  # each parameter is cut by itself
        part = FP32 * sum(-(-number // ranks) for group in groups.values() for number in group)
        return States(part, part, 2 * part + steps)
    # A group is one flat buffer; a rank's part of it is copied once more, as its master.
    flat = part = 0
    for kind, group in groups.items():
        holders = expert_ranks if kind == "apart" else ranks
        padded = FP32 * padded_group(sum(group), holders)
        flat, part = flat + padded, part + padded // holders
    return States(flat + part, part, 2 * part + steps)


def optimizer_groups(shapes: Mapping[str, Sequence[int]], slices: Mapping[str, Slice]) -> dict[str, list[int]]:
    """Elements of each parameter, grouped as engine/optim.py does; experts dealt out over ep are `apart`."""
    groups: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        kind = "apart" if slices[name].ep_dim is not None else group_of(name, slices[name].shape)
        groups.setdefault(kind, []).append(math.prod(shape))
    return groups


def padded_group(numbers: int, holders: int) -> int:
    """Elements of the flat buffer that stages 1 and 2 make of a group and cut among `holders`."""
    return -(-numbers // (2 * holders)) * 2 * holders


def zero_peaks(
    config: RunConfig, meter: MemoryMeter, held: States, shapes: Mapping[str, Sequence[int]], *, dp_size: int
) -> dict[str, dict[str, int]]:
    """What is live at most in each moment, by purpose, from a rehearsal of the model alone.

    Buffers are as large as DeepSpeed's defaults or the run's `deepspeed_config` make them: gradients are copied to a
    bucket and reduced when it is full or the backward ends; ZeRO-3 keeps what it gathered up to `max_live_parameters`.
    """
    stage, whole = config.engine.zero_stage, _whole(shapes)
    settings = deepspeed_config(config, dp_size=dp_size, cuda=False)["zero_optimization"]
    bucket = FP32 * int(settings.get("reduce_bucket_size", 5e8))
    live = FP32 * int(settings.get("stage3_max_live_parameters", 1e9))
    gathered = min(whole, live) if stage == 3 else 0
    flattened = min(whole, bucket) * (2 if stage == 3 else 1)
    kept = held.weights + held.moments + (held.gradients if stage == 3 else 0)
    peaks: dict[str, dict[str, int]] = {}
    for moment, found in meter.peaks.items():
        backward = "backward" in moment
        peaks[moment] = {
            "states": kept,
            "gradients": found["gradients"] if stage == 0 else 0,
            "gathered": gathered,
            "buckets": bucket if stage == 3 or (backward and stage) else 0,
            "rest": found["rest"],
        }
        if backward and stage and whole > bucket:  # it is emptied on the way
            peaks[moment]["buckets"] += flattened
    summed = held.gradients if stage != 3 else 0
    peaks["reduction of gradients"] = {
        "states": kept,
        "gradients": summed,
        "gathered": gathered,
        "buckets": (bucket if stage else 0) + flattened,
        "rest": 0,
    }
    peaks["optimizer step"] = {"states": kept, "gradients": 2 * summed if stage else summed, "buckets": 0, "rest": 0}
    if stage == 3:
        peaks["optimizer step"]["buckets"] = bucket
    return peaks


def _whole(shapes: Mapping[str, Sequence[int]]) -> int:
    return FP32 * sum(math.prod(shape) for shape in shapes.values())
