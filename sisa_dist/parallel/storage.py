"""A rank's stored tensor as what it is: a part of one global tensor, cut by tp, or by ep, and then by FSDP.

Initialisation, checkpoints and the doctor look at parameters, gradients and moments through this view; nothing
computes with it. On plain slices a checkpoint would keep one tp rank's weights, in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh


def fsdp_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension in which FSDP cuts a tp slice of `shape` over `ranks` data ranks.

    Experts [E, …] of which there are fewer than ranks, or which the ranks do not divide, are cut across: in whole
    experts some ranks would hold several times what others do, or nothing.
    """
    return 1 if len(shape) == 3 and shape[0] % ranks and shape[1] % ranks == 0 else 0


def as_global(stored: Tensor, part: Slice, mesh: Mesh) -> Tensor:
    """A DTensor over tp × dp_shard, or ep × expert_dp, with the memory of `stored`: FSDP's shard of a slice, or a slice
    as a plain tensor.

    Ranks along dp_replicate hold equal copies. Nothing is sent or copied. `stored` is a weight, gradient or moment.
    On one process plain tensors stay as they are.
    """
    if mesh.world_size == 1 and not isinstance(stored, DTensor):
        return stored.detach()
    over_dp = stored.placements[-1] if isinstance(stored, DTensor) else Replicate()
    cut = Replicate() if part.dim is None else Shard(part.dim)
    placements: tuple[Placement, ...]
    if part.ep_dim is not None:
        assert mesh.expert_mesh is not None
        device_mesh, placements = mesh.expert_mesh, (cut, over_dp)
    else:
        device_mesh, placements = mesh.stored_mesh, (cut, over_dp) if mesh.tp_size > 1 else (over_dp,)
    stride = torch.empty(part.shape, device="meta").stride()
    # Not DTensor.from_local: it would copy what is offloaded to the CPU to the mesh's device.
    assert stored.dtype == torch.float32, "masters and moments are fp32: this is a gathered compute copy"
    local = (stored.to_local() if isinstance(stored, DTensor) else stored).detach()
    return DTensor(
        local,  # type: ignore[call-arg]
        DTensorSpec(
            device_mesh,
            placements,
            tensor_meta=TensorMeta(part.shape, stride, stored.dtype),
        ),
        requires_grad=False,
    )


def buffers_as_global(model: nn.Module, mesh: Mesh) -> dict[str, Tensor]:
    """Under `model.` + full name, what a checkpoint holds of the model beside its parameters: alike on every rank."""
    return {
        f"model.{name}": as_global(buffer, Slice(None, "full", buffer.shape), mesh)
        for name, buffer in model.named_buffers()
    }
