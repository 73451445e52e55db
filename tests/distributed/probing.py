"""Whole weights and gradients out of either engine, for tests: collective, and at no regard for memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from sisa_dist.engine import Engine
from sisa_dist.engine.fsdp import FSDP2Engine


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every parameter and buffer whole, by full name."""
    if isinstance(engine, FSDP2Engine):
        state = engine.state_tensors()
        return {name[6:]: whole(tensor) for name, tensor in state.items() if name.startswith("model.")}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.model.parameters()), enabled=engine.stage == 3):  # type: ignore
        found = {n: whole(engine._as_global(n, p.data)) for n, p in engine.model.named_parameters()}  # type: ignore
    return found | {n: whole(buffer) for n, buffer in engine.model.named_buffers()}  # type: ignore[attr-defined]


def on_gradients(engine: Any, see: Callable[[dict[str, Tensor]], None]) -> None:
    """Has `see` called with every gradient, whole and unclipped, at the next step."""
    if isinstance(engine, FSDP2Engine):
        real_clip = engine._clip

        def clip() -> Tensor:
            engine._clip = real_clip  # type: ignore[method-assign]
            see({n: whole(engine._as_global(n, p.grad)) for n, p in engine.model.named_parameters()})  # type: ignore
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
            found[name] = whole(engine._as_global(name, grad))
        see(found)
        return real_step()

    engine._step = step


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().cpu()
