"""The global gradient norm over ranks that hold different parts of it, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh


def global_norm(grads: Iterable[tuple[Tensor, Slice]], mesh: Mesh, *, sharded: bool = True) -> Tensor:
    """L2 norm of all gradients as one vector, fp32 scalar on `mesh.device`, equal on every rank. Collective.

    A gradient cut by tp is summed over tp and FSDP's axis; one that every tp rank holds whole over FSDP's axis alone,
    or it would count tp times. Experts dealt out over ep are cut by ranks of FSDP's axis already. Without `sharded`
    every data rank has the gradients of its slices whole.
    """
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for grad, part in grads:
        parts[part.tp_dim is not None].append(grad.to_local() if isinstance(grad, DTensor) else grad)
    squares = torch.stack([_square(parts[True], mesh.device), _square(parts[False], mesh.device)])
    cut, whole = (mesh.sum_over(squares, "dp_shard") if sharded else squares).unbind()
    return (mesh.sum_over(cut, "tp") + whole).sqrt().float()


def clip_gradients(parameters: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    """Scale the gradients so that a global norm of `norm` becomes at most `limit`, on the device, in place.

    Mesh by mesh: one call may not mix them, and experts dealt out over ep live on another.
    """
    of_mesh: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        of_mesh.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    for chosen in of_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(chosen, limit, norm)


def _square(grads: list[Tensor], device: torch.device) -> Tensor:
    # In fp64: an fp32 sum over the quickstart's embedding is off by 3e-5, and by another 3e-5 in every layout.
    squares = [norm.to(device).square() for norm in torch._foreach_norm(grads, 2, dtype=torch.float64)] if grads else []
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
