"""What one rank computes in a training step, operator by operator: FLOPs, and bytes read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "recomputation", "backward", "optimizer"]


@dataclass(frozen=True)
class Work:
    """All calls of operators of one kind, dtype and size in one step of one rank."""

    phase: Phase
    operator: str  # aten::mm, sisa_dist::sigmoid_sisa, …
    dtype: str  # it multiplies in: float32, bfloat16
    calls: int
    flops: float  # of a call; 0 where nothing is multiplied with matrices
    nbytes: int  # of a call: arguments and results
