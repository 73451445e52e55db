"""Sanity checks round a step, for debugging a new split or a suspicious machine. Off, they cost nothing.

They hold what the equations promise: gradients are finite and replicas are equal to the bit, in weight and gradient,
over tp where a parameter is held whole and over dp_replicate everywhere. Tied weights are one parameter here, so ties
cannot part; that they are one is checked too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh

EVERYWHERE = ("tp", "dp_shard", "dp_replicate")


def check_step(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    slices: Mapping[str, Slice],
    mesh: Mesh,
    *,
    tied: bool,
    step: int,
) -> None:
    """Between backward and clipping. Collective. Raises RuntimeError on every rank, naming the first parameter."""
    if tied and "head.weight" in weights:
        raise RuntimeError(f"step {step}: embeddings are tied but the head has a weight of its own")
    grads: dict[str, Tensor] = {}
    for name, grad in gradients.items():
        if grad is None:
            raise RuntimeError(f"step {step}: {name} has no gradient: it is not part of the loss")
        grads[name] = _local(grad)
    broken = torch.stack([(~grad.isfinite()).any().to(mesh.device) for grad in grads.values()])
    if names := _anywhere(broken, list(grads), mesh):
        raise RuntimeError(f"step {step}: a gradient of {_listed(names)} is not finite")
    for kind, tensors in (("weights", weights), ("gradients", grads)):
        for axis, names in unequal_replicas(tensors, slices, mesh).items():
            if names:
                raise RuntimeError(f"step {step}: ranks along {axis} hold different {kind} of {_listed(names)}")


def unequal_replicas(tensors: Mapping[str, Tensor], slices: Mapping[str, Slice], mesh: Mesh) -> dict[str, list[str]]:
    """Names of the parameters that ranks along tp, or along dp_replicate, should hold alike but do not. Collective.

    By checksums: two numbers a tensor are sent. The same answer on every rank.
    """
    whole = [name for name in tensors if slices[name].tp_dim is None]
    found = {}
    for axis, names in (("tp", whole), ("dp_replicate", list(tensors))):
        sums_PK = torch.stack([checksum(_local(tensors[name])).to(mesh.device) for name in names])
        found[axis] = _anywhere(_differ(sums_PK, mesh, axis), names, mesh)
    return found


def checksum(tensor: Tensor) -> Tensor:
    """Two int64 sums over the bits of a local fp32 tensor, the second by position: equal tensors have equal ones."""
    bits = tensor.detach().contiguous().flatten().float().view(torch.int32).long()
    position = torch.arange(1, bits.numel() + 1, device=bits.device)
    return torch.stack((bits.sum(), (bits * position).sum()))


def _differ(sums_PK: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """[P] bool: whether the ranks of `axis` disagree on a row."""
    most, least = sums_PK.clone(), sums_PK.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.group(axis))
    dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.group(axis))
    return (most != least).any(1)


def _anywhere(bad_P: Tensor, names: list[str], mesh: Mesh) -> list[str]:
    """The names marked on any rank."""
    counts = mesh.sum_over(bad_P.long(), *EVERYWHERE).tolist()
    return [name for name, count in zip(names, counts, strict=True) if count]


def _listed(names: list[str]) -> str:
    return names[0] + (f" and of {len(names) - 1} others" if names[1:] else "")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
