"""Mistakes one can make in saving and loading, each made on purpose: the tests of moving must see every one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sisa_dist.checkpoint import load
from sisa_dist.checkpoint.staging import local_memory
from sisa_dist.engine.deepspeed import DeepSpeedEngine
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.parallel.apply import Slice


@contextlib.contextmanager
def mistaken(name: str | None) -> Iterator[None]:
    """The mistake `name` in force."""
    with contextlib.ExitStack() as stack:
        for patch in [] if name is None else MISTAKES[name]():
            stack.enter_context(patch)
        yield


def _moment_dropped() -> list[Any]:
    real = load.read_tensors

    def read_tensors(tensors: Mapping[str, Tensor], checkpoint: Path, **options: Any) -> None:
        real({n: t for n, t in tensors.items() if not n.startswith("exp_avg_sq.")}, checkpoint, **options)
        for name, view in tensors.items():
            if name.startswith("exp_avg_sq."):
                local_memory(view).zero_()

    return [mock.patch.object(load, "read_tensors", read_tensors)]


def _step_forgotten() -> list[Any]:
    def forgetting(engine: type) -> Any:
        real = engine.set_step  # type: ignore[attr-defined]
        return mock.patch.object(engine, "set_step", lambda self, step: real(self, 0))

    return [forgetting(FSDP2Engine), forgetting(DeepSpeedEngine)]


def _cursor_off() -> list[Any]:
    real = load.read_state

    def read_state(checkpoint: Path) -> Any:
        state = real(checkpoint)
        return dataclasses.replace(state, cursor=state.cursor + 1)

    return [mock.patch.object(load, "read_state", read_state)]


def _slices_plain() -> list[Any]:
    """A rank's slice goes to the checkpoint, and comes back, as if it were the whole tensor."""

    def hiding(engine: type) -> Any:
        real: Callable[[Any], dict[str, Tensor]] = engine.state_tensors  # type: ignore[attr-defined]

        def state_tensors(self: Any) -> dict[str, Tensor]:
            def shape(part: Slice) -> torch.Size:
                return torch.Size(
                    n // self.mesh.tp_size if dim == part.tp_dim else n for dim, n in enumerate(part.shape)
                )

            truth = self.slices
            self.slices = {
                name: dataclasses.replace(part, tp_dim=None, shape=shape(part)) for name, part in truth.items()
            }
            try:
                return real(self)
            finally:
                self.slices = truth

        return mock.patch.object(engine, "state_tensors", state_tensors)

    return [hiding(FSDP2Engine), hiding(DeepSpeedEngine)]


MISTAKES: dict[str, Callable[[], list[Any]]] = {
    "a moment dropped": _moment_dropped,
    "Adam's step forgotten": _step_forgotten,
    "the cursor off by one": _cursor_off,
    "slices stored plain": _slices_plain,
}
