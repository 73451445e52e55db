"""What a rank stores from step to step, to the byte: fp32 weights, gradients and Adam's moments, by each engine's rule.

Arithmetic on the plan's slices; nothing is built. What a step needs beyond this is the rehearsal's affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sisa_dist.config import RunConfig
from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.training.zero import FP32, States, zero_states


def states(config: RunConfig, slices: Mapping[str, Slice], mesh: Mesh, *, shard_rank: int = 0) -> States:
    """Of the rank at `shard_rank` on the axis dp_shard; 0 holds most."""
    sizes = local_shapes(slices, mesh)
    if config.engine.kind == "deepspeed":
        return zero_states(config.engine.zero_stage, sizes, slices, mesh.size("dp_shard"))
    # FSDP2 cuts dim 0 in chunks of ceil(rows / ranks): the last ranks may hold less, or nothing.
    numbers = []
    for shape in sizes.values():
        rows = -(-shape[0] // mesh.size("dp_shard"))
        mine = max(0, min(rows, shape[0] - shard_rank * rows))
        numbers.append(mine * math.prod(shape[1:]))
    held = FP32 * sum(numbers)
    return States(held, held, 2 * held + FP32 * len(numbers))


def local_shapes(slices: Mapping[str, Slice], mesh: Mesh) -> dict[str, list[int]]:
    """What tensor parallelism leaves a rank of every parameter; all its ranks have as much."""
    shapes = {name: list(part.shape) for name, part in slices.items()}
    for name, part in slices.items():
        if part.tp_dim is not None:
            shapes[name][part.tp_dim] //= mesh.tp_size
    return shapes
