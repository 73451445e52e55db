"""Running decay and phase of SISA, and the rotation by that phase.

Kept apart because every path (dense, single, bisected, decode) must use one convention: pairs are adjacent, Φ and g
include their own token, and both sums run in fp64. Only *differences* of g and Φ enter the score, and an fp32 running
sum at |g| = 1e4 makes those wrong by 6e-4; in fp64 they are right to 1e-12 at any length we can train, for the price
of one [.., T] and one [.., T, d_s/2] temporary. Nothing here knows about attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def running_sum(x: Tensor, *, dim: int) -> Tensor:
    """Inclusive running sum along `dim` in fp64, whatever the input's floating dtype."""
    return torch.cumsum(x, dim=dim, dtype=torch.float64)


def phase_cos_sin(phase_BHTm: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of an fp64 phase (radians), in `dtype`.

    The phase is reduced mod 2π in fp64 first: an fp32 cosine of a phase of 1e5 radians has lost half its digits.
    """
    if dtype != torch.float64:
        phase_BHTm = torch.remainder(phase_BHTm, 2 * math.pi).to(dtype)
    return torch.cos(phase_BHTm), torch.sin(phase_BHTm)


def rotate(x_BHTs: Tensor, cos_BHTm: Tensor, sin_BHTm: Tensor) -> Tensor:
    """R(φ) on each adjacent pair (2m, 2m+1) of the last dimension: [[cos, -sin], [sin, cos]]."""
    even, odd = x_BHTs.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos_BHTm - odd * sin_BHTm, even * sin_BHTm + odd * cos_BHTm), dim=-1).flatten(-2)


def turn(x: Tensor, phase: Tensor) -> Tensor:
    """`rotate` of the first 2m channels of x `[..., N]` by phase `[..., m]`, the others as they are; x's dtype.

    phase broadcasts to x. Both fp32 or both fp64. What rotate and a concatenation give, at less than half of their time
    on CPU: the pairs are numbers of the complex plane, turned in one copy of x, and the gradient of φ is read off the
    result, y_even g_odd − y_odd g_even.
    """
    if torch.compiler.is_compiling():  # it fuses the plain form, and has no code for complex numbers
        num = 2 * phase.shape[-1]
        return torch.cat((rotate(x[..., :num], phase.cos(), phase.sin()), x[..., num:]), dim=-1)
    return _Turn.apply(x, phase)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, phase: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        _pairs(y, phase.shape[-1]).mul_(torch.complex(phase.cos(), phase.sin()))
        ctx.save_for_backward(y, phase)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, phase = ctx.saved_tensors
        num = phase.shape[-1]
        (y_even, y_odd), (even, odd) = (z[..., : 2 * num].unflatten(-1, (num, 2)).unbind(-1) for z in (y, grad))
        grad_phase = (y_even * odd - y_odd * even).sum_to_size(phase.shape)
        grad_x = grad.clone(memory_format=torch.contiguous_format)
        _pairs(grad_x, num).mul_(torch.complex(phase.cos(), -phase.sin()))
        return grad_x, grad_phase


def _pairs(x: Tensor, num: int) -> Tensor:
    """The first `num` adjacent pairs of the last dimension as complex numbers, a view. N is even."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))[..., :num]


def expand_kv(x: Tensor, num_heads: int) -> Tensor:
    """Repeat kv heads (dim 1) so that query head h reads kv head h // (H / H_kv); no copy where H_kv = H."""
    group = num_heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)
