"""Runs one of our own operators as the Python it is, once, for a meter that wants to know what it does inside."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def is_ours(name: str) -> bool:
    return name.startswith("sisa_dist::")


def call_key(name: str, args: tuple[Any, ...]) -> Hashable:
    """Equal for calls that do the same, up to values."""
    return name, tuple((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args)


def run_inside(name: str, args: tuple[Any, ...], meter: TorchDispatchMode) -> None:
    """Under `meter` alone, whatever other meters are entered: to them this did not happen."""
    fake = next((a.fake_mode for a in args if isinstance(a, FakeTensor)), None)
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        if fake is not None:
            stack.enter_context(fake)
        stack.enter_context(torch.no_grad())
        stack.enter_context(meter)
        OPDEFS[name]._init_fn(*args)
