"""Which dtype the score is computed in, and autocast kept out of it. One place, so that all paths agree."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What exponents, phases and sums are held in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """16-bit to fp32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def exp_(x: Tensor) -> Tensor:
    """e^x in place, with results under e^-80 (fp64: e^-700) set to exactly 0.

    The exponents here are ≤ 0 and their results weigh against 1, so nothing above half an ulp is lost. It is for time:
    on CPU an exponential that underflows costs 13 to 130 times a normal one, as does arithmetic on denormals, and
    masks and strong decay are full of both. The cost must not depend on the data.
    """
    floor = -700.0 if x.dtype == torch.float64 else -80.0
    x.clamp_(min=floor).exp_()
    return F.threshold(x, 1.1 * math.exp(floor), 0.0, inplace=True)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: the functions of this package cast explicitly. The meta device has none to switch off.

    Its name is asked for, not torch.amp.is_autocast_available, at which torch 2.11's compiler breaks the graph.
    """
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
