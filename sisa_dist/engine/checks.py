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

from sisa_dist.model import LM
from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh


def check_step(model: LM, slices: Mapping[str, Slice], mesh: Mesh, *, step: int) -> None:
    """Between backward and clipping. Collective. Raises RuntimeError on every rank, naming the first parameter."""
    if model.config.tie_embeddings and any(name.startswith("head.") for name, _ in model.named_parameters()):
        raise RuntimeError(f"step {step}: embeddings are tied but the head has a weight of its own")
    named = list(model.named_parameters())
    for name, parameter in named:
        if parameter.grad is None:
            raise RuntimeError(f"step {step}: {name} has no gradient: it is not part of the loss")
    broken = torch.stack([(~_local(p.grad).isfinite()).any().to(mesh.device) for _, p in named])  # type: ignore[arg-type]
    _report(
        mesh.sum_over(broken.long(), "tp", "dp_shard", "dp_replicate"),
        named,
        f"step {step}: a gradient of {{}} is not finite",
    )
    whole = [(name, p) for name, p in named if slices[name].tp_dim is None]
    for axis, replicas in (("tp", whole), ("dp_replicate", named)):
        for kind, tensors in (
            ("weights", [_local(p) for _, p in replicas]),
            ("gradients", [_local(p.grad) for _, p in replicas]),  # type: ignore[arg-type]
        ):
            differs = _differ(torch.stack([checksum(t).to(mesh.device) for t in tensors]), mesh, axis)
            everywhere = mesh.sum_over(differs.long(), "tp", "dp_shard", "dp_replicate")
            _report(everywhere, replicas, f"step {step}: ranks along {axis} hold different {kind} of {{}}")


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


def _report(bad_P: Tensor, named: list, message: str) -> None:
    names = [name for (name, _), bad in zip(named, bad_P.tolist(), strict=True) if bad]
    if names:
        raise RuntimeError(message.format(names[0]) + (f" and of {len(names) - 1} others" if names[1:] else ""))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
