"""Whole weights and gradients out of either engine, for tests: collective, and at no regard for memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sisa_dist.engine import Engine
from sisa_dist.engine.fsdp import FSDP2Engine


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every parameter and buffer whole, by full name."""
    if isinstance(engine, FSDP2Engine):
        state = engine.state_tensors()
        return whole({name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")})
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.model.parameters()), enabled=engine.stage == 3):  # type: ignore
        found = whole({n: engine._as_global(n, p.data) for n, p in engine.model.named_parameters()})  # type: ignore
    return found | whole(dict(engine.model.named_buffers()))  # type: ignore[attr-defined]


def on_gradients(engine: Any, see: Callable[[dict[str, Tensor]], None]) -> None:
    """Has `see` called with every gradient, whole and unclipped, at the next step."""
    if isinstance(engine, FSDP2Engine):
        real_clip = engine._clip

        def clip() -> Tensor:
            engine._clip = real_clip  # type: ignore[method-assign]
            see(whole({n: engine._as_global(n, p.grad) for n, p in engine.model.named_parameters()}))  # type: ignore
            return real_clip()

        engine._clip = clip  # type: ignore[method-assign]
        return
    from deepspeed.utils import safe_get_full_grad

    real_step = engine._step

    def step() -> Any:
        engine._step = real_step
        found = {}
        for name, parameter in engine.model.named_parameters():
            grad = parameter.grad if engine.stage == 0 else safe_get_full_grad(parameter)
            assert grad is not None, name
            found[name] = engine._as_global(name, grad)
        see(whole(found))
        return real_step()

    engine._step = step


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole, on every rank, in one collective: DTensor's own, one by one, took half of a case. Of what several hold a
    rank's own counts, or else the first's."""
    cut = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    places = {n: compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements) for n, t in cut.items()}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {name: (places[name], tensor.to_local().cpu()) for name, tensor in cut.items()})
    found = {
        name: torch.full(tensor.shape, torch.nan, dtype=tensor.dtype) if name in cut else tensor.clone().cpu()
        for name, tensor in tensors.items()
    }
    for held in (*reversed(ranks), ranks[dist.get_rank()]):
        for name, ((shape, offset), local) in held.items():
            assert tuple(local.shape) == tuple(shape), name
            found[name][tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] = local
    return found
