"""The turn of leading channels by a phase that is itself differentiated, against rotate and a concatenation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sisa_dist.ops.rotation import rotate, turn


def plainly(x: Tensor, phase: Tensor) -> Tensor:
    num = 2 * phase.shape[-1]
    return torch.cat((rotate(x[..., :num], phase.cos(), phase.sin()), x[..., num:]), dim=-1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("num", [2, 4])  # half of the channels, as in Mamba-3, and all of them
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_rotate(rows: int, num: int, dtype: torch.dtype) -> None:
    """One phase for all rows of a token; x and the gradient that comes back are not contiguous."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, rows, 8, generator=g, dtype=dtype).transpose(1, 2).requires_grad_()
    phase = (10 * torch.randn(2, 3, 5, 1, num, generator=g, dtype=dtype)).requires_grad_()
    cotangent = torch.randn(8, rows, 5, 3, 2, generator=g, dtype=dtype).permute(4, 3, 2, 1, 0)
    got, want = ((y, *torch.autograd.grad(y, (x, phase), cotangent)) for y in (turn(x, phase), plainly(x, phase)))
    bound = 1e-13 if dtype == torch.float64 else 5e-6
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert (a - b).abs().max() <= bound * b.abs().max()


def test_what_went_in_is_not_changed() -> None:
    x, phase = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 2)
    y = turn(x, phase)
    assert torch.equal(x, torch.ones_like(x)) and not torch.equal(y, x)
