"""What DeepSpeed's ZeRO sends in a step beyond what the model sends: gradients, weights and norms.

DeepSpeed cannot be rehearsed, so this is arithmetic on 0.19 with fp32 parameters, as our engine runs it, and with its
own defaults where the run's `deepspeed_config` says nothing. Gradients are summed by all-reduces up to stage 2, also
where they are partitioned: DeepSpeed sends whole buckets and each rank keeps its part. Not known here: quantised
weights and gradients, hpZ and MiCS groups, `use_multi_rank_bucket_allreduce: false`, stages of NVMe.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sisa_dist.config import RunConfig
from sisa_dist.engine.deepspeed_config import deepspeed_config
from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.training.traffic_meter import TrafficMeter
from sisa_dist.training.zero import FP32, optimizer_groups, padded_group
from sisa_dist.training.zero_gathers import Use, gathers, with_backward

WHOLE_STEP_BUCKET = 500_000_000  # elements, of stage 0


def add_zero_traffic(
    seen: TrafficMeter,
    config: RunConfig,
    mesh: Mesh,
    slices: Mapping[str, Slice],
    shapes: Mapping[str, Sequence[int]],
    *,
    micro_batches: int,
    uses: Sequence[Use],
) -> None:
    """What stage `config.engine.zero_stage` sends in a step of so many micro-batches, to what was seen of the model.

    `shapes` are a rank's slices, in the order of the model's parameters; `uses` those of a forward, for stage 3.
    """
    stage = config.engine.zero_stage
    zero = deepspeed_config(config, dp_size=mesh.dp_size, cuda=False)["zero_optimization"]
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if stage == 3:
        trace = with_backward(uses, recomputed=config.engine.activation_checkpointing)
        _stage_3(seen, zero, sizes, mesh, trace, micro_batches=micro_batches)
        norm = FP32 if config.engine.cpu_offload else 2 * FP32
    else:
        _reduce(seen, zero, sizes, slices, mesh, stage=stage, rounds=micro_batches if stage == 2 else 1)
        norm = FP32
    groups = optimizer_groups(shapes, slices)
    # A norm of each group; without ZeRO one of all, and only to clip by (the one we report is seen in the rehearsal).
    norms = len(groups) if stage else int(config.optimizer.grad_clip is not None)
    for axis in ("dp_shard", "tp"):
        seen.add("all_reduce", mesh.group(axis), [norm] * norms)
    for kind, numbers in groups.items():
        if stage and kind == "apart":  # is summed over its holders, and as the others are
            seen.add("all_reduce", mesh.group("expert_dp"), [norm])
        if stage in (1, 2):  # updated weights
            axis = "expert_dp" if kind == "apart" else "dp_shard"
            seen.add("all_gather", mesh.group(axis), [FP32 * padded_group(sum(numbers), mesh.size(axis))])


def _reduce(
    seen: TrafficMeter,
    zero: dict[str, Any],
    sizes: Mapping[str, int],
    slices: Mapping[str, Slice],
    mesh: Mesh,
    *,
    stage: int,
    rounds: int,
) -> None:
    """Stages 0 to 2: gradients by all-reduces of buckets, experts' over the ranks that hold the same."""
    limit = int(zero["reduce_bucket_size"]) if stage else WHOLE_STEP_BUCKET
    for bucket in _buckets(sizes, limit) * rounds:
        for axis, theirs in (("dp_shard", False), ("expert_dp", True)):
            numbers = [sizes[name] for name in bucket if (slices[name].ep_dim is not None) == theirs]
            if numbers:
                seen.add("all_reduce", mesh.group(axis), [FP32 * sum(numbers)])


def _stage_3(
    seen: TrafficMeter,
    zero: dict[str, Any],
    sizes: Mapping[str, int],
    mesh: Mesh,
    uses: Sequence[Use],
    *,
    micro_batches: int,
) -> None:
    """Gradients are scattered in every micro-batch; weights are gathered for it, but small ones, which every rank
    keeps, once they have changed."""
    group, ranks = mesh.group("dp_shard"), mesh.size("dp_shard")

    def whole(names: Iterable[str]) -> int:
        """Bytes, each parameter padded to equal parts."""
        return FP32 * sum(ranks * -(-sizes[name] // ranks) for name in names)

    kept = _persistent(sizes, zero)
    gathered = gathers(
        uses,
        sizes,
        kept,
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
    )
    for _ in range(micro_batches):
        seen.add("reduce_scatter", group, map(whole, _buckets(sizes, int(zero["reduce_bucket_size"]))))
        seen.add("all_gather", group, map(whole, gathered))
    seen.add("all_gather", group, (whole([name]) for name in kept))


def _persistent(sizes: Mapping[str, int], zero: dict[str, Any]) -> list[str]:
    most = int(zero.get("stage3_param_persistence_threshold", 1e5))
    of_model = int(zero.get("stage3_model_persistence_threshold", sys.maxsize))
    kept: list[str] = []
    held = 0
    for name, size in sizes.items():
        if size <= most and held + size <= of_model:
            kept.append(name)
            held += size
    return kept


def _buckets(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Parameters from the last to the first, about as their gradients come, until one more would be over `limit`."""
    buckets: list[list[str]] = []
    held = limit + 1
    for name in reversed(list(sizes)):
        if held + sizes[name] > limit:
            buckets.append([])
            held = 0
        buckets[-1].append(name)
        held += sizes[name]
    return buckets
