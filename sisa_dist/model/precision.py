"""The precision rule of the small computations: at least fp32, and fp64 where the model is the fp64 reference."""

from __future__ import annotations

from torch import Tensor, float64


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == float64 else x.float()
