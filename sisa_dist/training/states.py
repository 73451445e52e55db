"""What a rank stores from step to step, to the byte: fp32 weights, gradients and Adam's moments, by each engine's rule.

Arithmetic on the plan's slices; nothing is built. What a step needs beyond this is the rehearsal's affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sisa_dist.config import RunConfig
from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh

FP32 = 4  # bytes
# DeepSpeed's default: elements of a bucket of gradients, allocated whole while they are reduced or, in ZeRO-3, always.
REDUCE_BUCKET = 500_000_000


@dataclass(frozen=True)
class States:
    """Bytes of one rank. `gradients` as they stand at the optimizer's step; `moments` with Adam's step counts."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def states(config: RunConfig, slices: Mapping[str, Slice], mesh: Mesh, *, shard_rank: int = 0) -> States:
    """Of the rank at `shard_rank` on the axis dp_shard; 0 holds most."""
    sizes = {name: local_shape(part, mesh.tp_size) for name, part in slices.items()}
    if config.engine.kind == "deepspeed":
        return _zero(config.engine.zero_stage, sizes, slices, mesh.size("dp_shard"))
    # FSDP2 cuts dim 0 in chunks of ceil(rows / ranks): the last ranks may hold less, or nothing.
    numbers = []
    for shape in sizes.values():
        rows = -(-shape[0] // mesh.size("dp_shard"))
        mine = max(0, min(rows, shape[0] - shard_rank * rows))
        numbers.append(mine * math.prod(shape[1:]))
    held = FP32 * sum(numbers)
    return States(held, held, 2 * held + FP32 * len(numbers))


def _zero(stage: int, sizes: Mapping[str, list[int]], slices: Mapping[str, Slice], ranks: int) -> States:
    """ZeRO of DeepSpeed 0.19, on fp32 parameters. Every rank holds the same number of bytes: partitions are padded."""
    whole = FP32 * sum(math.prod(shape) for shape in sizes.values())
    if stage == 0:
        return States(whole, whole, 2 * whole + FP32 * len(sizes))
    groups: dict[str, list[int]] = {}
    for name, shape in sizes.items():  # as engine/optim.py groups them
        kind = "lambda" if name.endswith("lambda_raw") else "vectors" if len(slices[name].shape) < 2 else "matrices"
        groups.setdefault(kind, []).append(math.prod(shape))
    if stage == 3:  # each parameter by itself; compute weights are the masters
        part = FP32 * sum(-(-number // ranks) for group in groups.values() for number in group)
        return States(part, part, 2 * part + FP32 * len(groups))
    # Stages 1 and 2: a group is one flat buffer, padded to 2 · ranks elements, and each rank's part a master beside it.
    flat = [-(-sum(group) // (2 * ranks)) * 2 * ranks for group in groups.values()]
    part = FP32 * sum(flat) // ranks
    return States(FP32 * sum(flat) + part, part, 2 * part + FP32 * len(groups))


def local_shape(part: Slice, tp_size: int) -> list[int]:
    """A rank's slice under tensor parallelism."""
    shape = list(part.shape)
    if part.tp_dim is not None:
        shape[part.tp_dim] //= tp_size
    return shape
