"""What a rank stores from step to step, to the byte: fp32 weights, gradients and Adam's moments, by each engine's rule.

Arithmetic on the plan's slices; nothing is built. What a step needs beyond this is the rehearsal's affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sisa_dist.config import RunConfig
from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.parallel.storage import fsdp_dim
from sisa_dist.training.zero import FP32, States, zero_states


def states(config: RunConfig, slices: Mapping[str, Slice], mesh: Mesh, *, shard_rank: int = 0) -> States:
    """Of the rank at `shard_rank` on the axis dp_shard; 0 holds most."""
    sizes = local_shapes(slices, mesh)
    if config.engine.kind == "deepspeed":
        return zero_states(config.engine.zero_stage, sizes, slices, mesh.size("dp_shard"), mesh.size("expert_dp"))
    # FSDP2 cuts a dimension in chunks of ceil(rows / ranks): the last ranks may hold less, or nothing.
    numbers = []
    for name, shape in sizes.items():
        ranks, rank = mesh.size("dp_shard"), shard_rank
        if slices[name].ep_dim is not None:
            ranks, rank = mesh.size("expert_dp"), shard_rank // mesh.ep_size
        length = shape[fsdp_dim(shape, ranks)]
        rows = -(-length // ranks)
        numbers.append(max(0, min(rows, length - rank * rows)) * math.prod(shape) // length)
    held = FP32 * sum(numbers)
    return States(held, held, 2 * held + FP32 * len(numbers))


def local_shapes(slices: Mapping[str, Slice], mesh: Mesh) -> dict[str, list[int]]:
    """What tensor and expert parallelism leave a rank of every parameter; all ranks have as much."""
    return {name: list(part.local_shape(part.place(mesh)[1])) for name, part in slices.items()}
