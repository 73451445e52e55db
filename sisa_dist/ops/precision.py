"""Which dtype the score is computed in, and autocast kept out of it. One place, so that all paths agree."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What exponents, phases and sums are held in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """16-bit to fp32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: the functions of this package cast explicitly. Devices without autocast (meta) need nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
