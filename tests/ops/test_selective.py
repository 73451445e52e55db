"""The selective scan against its recurrence, in fp64: values, gradients, documents, states, any decay, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops import selective_scan

BATCH, D, N = 2, 5, 3
NAMES = ("x", "delta", "A", "B", "C")


def inputs(T: int, *, strength: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    z = {
        "x": normal(BATCH, T, D),
        "delta": strength * normal(BATCH, T, D).exp(),
        "A": -normal(D, N).exp(),
        "B": normal(BATCH, T, N),
        "C": normal(BATCH, T, N),
    }
    return {name: value.requires_grad_() for name, value in z.items()}


def recurrence(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    doc_ids: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(x.shape[0], D, N) if state is None else state
    rows = []
    for t in range(x.shape[1]):
        if t and doc_ids is not None:
            h = torch.where((doc_ids[:, t] == doc_ids[:, t - 1])[:, None, None], h, 0.0)
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta * x)[:, t, :, None] * B[:, t, None]
        rows.append((h * C[:, t, None]).sum(-1))
    return torch.stack(rows, dim=1), h


def gradients(y: Tensor, z: dict[str, Tensor]) -> tuple[Tensor, ...]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.autograd.grad((y * direction.to(y.dtype)).sum(), [z[name] for name in NAMES])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("strength", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize(("T", "chunk"), [(1, 8), (7, 8), (8, 8), (29, 8), (29, 1), (29, 13), (29, 64)])
def test_it_is_its_recurrence(T: int, chunk: int, strength: float, documents: bool) -> None:
    z = inputs(T, strength=strength)
    state = torch.randn(BATCH, D, N, dtype=torch.float64)
    doc_ids = torch.tensor([[0, 0, 1] + [1] * 5 + [2] + [4] * 20, [3] * 11 + [5] * 18])[:, :T] if documents else None
    want, want_state = recurrence(**z, doc_ids=doc_ids, state=state)
    got, got_state = selective_scan(**z, chunk=chunk, doc_ids=doc_ids, state=state)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * max(1, strength))
    torch.testing.assert_close(got_state, want_state, rtol=1e-12, atol=1e-12 * max(1, strength))
    for name, a, b in zip(NAMES, gradients(got, z), gradients(want, z), strict=True):
        assert (a - b).abs().max() < 1e-11 * b.abs().max().clamp(min=1e-3), name


def test_another_document_has_no_influence_at_all() -> None:
    z, doc_ids = inputs(29), torch.tensor([[0] * 11 + [1] * 9 + [2] * 9] * 2)
    y, _ = selective_scan(**z, chunk=8, doc_ids=doc_ids)
    inside = doc_ids == 1
    found = torch.autograd.grad(y[inside].square().sum(), [z["x"], z["delta"], z["B"], z["C"]])
    assert all(not gradient[~inside].any() and gradient[inside].any() for gradient in found)
    other = {n: v if n == "A" else torch.where(inside[..., None], v, v.flip(1)) for n, v in z.items()}
    assert torch.equal(selective_scan(**other, chunk=8, doc_ids=doc_ids)[0][inside], y[inside])


@pytest.mark.parametrize("strength", [1e-4, 1.0, 300.0])
def test_fp32_is_near_fp64(strength: float) -> None:
    single = {name: value.detach().float().requires_grad_() for name, value in inputs(100, strength=strength).items()}
    z = {name: value.detach().double().requires_grad_() for name, value in single.items()}
    want, got = selective_scan(**z)[0], selective_scan(**single)[0]
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 3e-6 * want.abs().max()
    for name, a, b in zip(NAMES, gradients(got, single), gradients(want, z), strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max().clamp(min=1e-3), name


def test_16_bit_inputs_are_worked_on_in_fp32() -> None:
    z = {name: value.detach().bfloat16() for name, value in inputs(20).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = selective_scan(**z)
    want, _ = selective_scan(**{name: value.float() for name, value in z.items()})
    assert state.dtype == torch.float32 and torch.equal(y, want)


def test_what_is_kept_for_the_backward_is_a_state_a_chunk() -> None:
    z, kept = inputs(256), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(**z, chunk=32)
    of_inputs = sum(value.numel() for value in z.values())
    assert sum(kept) - of_inputs == BATCH * D * N * math.ceil(256 / 32)


def test_shapes_that_do_not_fit_are_refused() -> None:
    z = inputs(4)
    with pytest.raises(UserError, match="do not fit"):
        selective_scan(**(z | {"B": z["B"][:, :3]}))
    with pytest.raises(UserError, match="do not fit"):
        selective_scan(**(z | {"A": z["A"][:3]}))
