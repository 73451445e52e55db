"""The chunked recurrence against the recurrence itself, in fp64: values, gradients, documents, states, any decay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops import ssd, ssd_step

B, H, N, P = 2, 4, 6, 5
NAMES = ("x", "log_decay", "B", "C", "weight", "diagonal", "state")


def inputs(T: int, *, groups: int = 2, rank: int = 1, decay: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    z = {
        "x": normal(B, H, T * rank, P),
        "log_decay": -decay * torch.rand(B, H, T, generator=g, dtype=torch.float64),
        "B": normal(B, groups, T * rank, N),
        "C": normal(B, groups, T * rank, N),
        "weight": normal(B, H, T),
        "diagonal": normal(B, H, T),
        "state": normal(B, H, N, P),
    }
    return {name: value.requires_grad_() for name, value in z.items()}


def recurrence(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    weight: Tensor,
    *,
    diagonal: Tensor | None = None,
    rank: int = 1,
    doc_ids: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = e^{a_t} S_{t−1} + w_t B_t x_tᵀ, token by token; the diagonal changes what y_t sees of its own token."""
    heads, T = log_decay.shape[1:]
    B, C = (z.repeat_interleave(heads // z.shape[1], 1).unflatten(2, (T, rank)) for z in (B, C))
    x = x.unflatten(2, (T, rank))
    S = x.new_zeros(x.shape[0], heads, B.shape[-1], x.shape[-1]) if state is None else state
    rows = []
    for t in range(T):
        if t and doc_ids is not None:
            S = torch.where((doc_ids[:, t] == doc_ids[:, t - 1])[:, None, None, None], S, 0.0)
        own = B[:, :, t].mT @ x[:, :, t]
        past = log_decay[:, :, t, None, None].exp() * S
        S = past + weight[:, :, t, None, None] * own
        seen = S if diagonal is None else past + diagonal[:, :, t, None, None] * own
        rows.append(C[:, :, t] @ seen)
    return torch.cat(rows, dim=2), S


def results(function, z: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """y, the final state and every gradient, under one cotangent for each."""
    y, final = function(**z, **options)
    g = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype) for out in (y, final)]
    gradients = torch.autograd.grad((y, final), list(z.values()), cotangents)
    return {"y": y, "final": final} | dict(zip(z, gradients, strict=True))


def without(z: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in z.items() if name not in names}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return max(((got[k].double() - want[k]).abs().max() / want[k].abs().max().clamp(min=1e-30)).item() for k in want)


def documents(T: int) -> Tensor:
    """Rows with borders inside chunks, at chunk borders and several within one chunk."""
    starts = torch.zeros(B, T, dtype=torch.long)
    for row, borders in enumerate(((3, 8, 9, 10, 24), (16, 30))):
        for border in borders:
            if border < T:
                starts[row, border] = 1
    return starts.cumsum(1) * 3


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 37])
@pytest.mark.parametrize("kind", ["plain", "state", "diagonal", "all"])
def test_chunks_are_the_recurrence(T: int, kind: str) -> None:
    drop = {"plain": ("diagonal", "state"), "state": ("diagonal",), "diagonal": ("state",), "all": ()}[kind]
    z = without(inputs(T), *drop)
    assert worst(results(ssd, z, chunk=8), results(recurrence, z)) < 1e-13


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 3])
def test_groups_ranks_and_documents(groups: int, rank: int) -> None:
    z = inputs(37, groups=groups, rank=rank)
    for doc_ids in (None, documents(37)):
        got, want = (results(f, z, rank=rank, doc_ids=doc_ids, **o) for f, o in ((ssd, {"chunk": 8}), (recurrence, {})))
        assert worst(got, want) < 1e-13


@pytest.mark.parametrize("decay", [1e-6, 3.0, 200.0])
@pytest.mark.parametrize("chunk", [8, 64])
def test_fp32_is_exact_and_finite_at_any_decay(decay: float, chunk: int) -> None:
    """One reference for the sequence would overflow past 88 nats in all: here they are up to 7 400."""
    z = inputs(37, decay=decay)
    small = {name: value.detach().float().requires_grad_() for name, value in z.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in small.items()}
    for doc_ids in (None, documents(37)):
        got, want = results(ssd, small, chunk=chunk, doc_ids=doc_ids), results(recurrence, exact, doc_ids=doc_ids)
        assert all(value.isfinite().all() for value in got.values())
        assert worst(got, want) < 3e-6


def test_one_strong_token_costs_the_others_no_digit() -> None:
    """A difference of running sums past a token of 1e5 nats would be wrong by 8e-3."""
    z = inputs(37)
    with torch.no_grad():
        z["log_decay"][:, :, 5] = -1e5
    small = {name: value.detach().float().requires_grad_() for name, value in z.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in small.items()}
    assert worst(results(ssd, small, chunk=16), results(recurrence, exact)) < 3e-6


def test_documents_are_apart_to_the_last_bit() -> None:
    """No number and no gradient of a document holds anything of another's, be that infinite."""
    T, border = 37, 21
    doc_ids = (torch.arange(T) >= border).long().expand(B, T)
    z = {name: value.detach().float().requires_grad_() for name, value in without(inputs(T), "state").items()}
    y, final = ssd(**z, chunk=8, doc_ids=doc_ids)
    other = {name: value.detach().clone() for name, value in z.items()}
    for value in other.values():
        value[:, :, :border] *= 50
    y_other, final_other = ssd(**other, chunk=8, doc_ids=doc_ids)
    assert torch.equal(y[:, :, border:], y_other[:, :, border:]) and torch.equal(final, final_other)
    assert not torch.equal(y[:, :, :border], y_other[:, :, :border])
    for part, hers in ((slice(0, border), slice(border, T)), (slice(border, T), slice(0, border))):
        gradients = torch.autograd.grad(y[:, :, hers].square().sum(), list(z.values()), retain_graph=True)
        assert all((gradient[:, :, part] == 0).all() and gradient.any() for gradient in gradients)
    (a_gradient,) = torch.autograd.grad(y.sum(), z["log_decay"])
    assert (a_gradient[:, :, border] == 0).all(), "a document's first decay acts on nothing"


@pytest.mark.parametrize("rank", [1, 2])
def test_pieces_and_steps_are_the_whole(rank: int) -> None:
    z = without(inputs(21, rank=rank), "diagonal")
    with torch.no_grad():
        want, final = ssd(**z, rank=rank, chunk=8)
        state, rows = z["state"], []
        for start, stop in ((0, 1), (1, 2), (2, 9), (9, 10), (10, 21)):
            piece = {
                name: value[:, :, start * (k := 1 if name in ("log_decay", "weight") else rank) : stop * k]
                for name, value in without(z, "state").items()
            }
            step = ssd_step if stop - start == 1 else ssd
            y, state = step(**piece, rank=rank, state=state)
            rows.append(y)
    torch.testing.assert_close(torch.cat(rows, dim=2), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-13)


def test_autocast_and_16_bits_are_summed_in_fp32() -> None:
    z = without(inputs(37), "state")
    half = {name: value.detach().to(torch.bfloat16) for name, value in z.items()}
    half |= {name: z[name].detach().float() for name in ("log_decay", "weight", "diagonal")}
    want, _ = recurrence(**{name: value.double() for name, value in half.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = ssd(**half, chunk=8)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert (y.double() - want).abs().max() <= 2**-8 * want.abs().max()  # one rounding, at the end


def test_memory_kept_is_three_matrices_a_chunk() -> None:
    """Twice the tokens keep twice the numbers: nothing is quadratic in T."""

    def kept(T: int) -> int:
        z = {name: value.detach().float().requires_grad_() for name, value in without(inputs(T), "state").items()}
        found: dict[int, int] = {}

        def note(value: Tensor) -> Tensor:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            out = ssd(**z, chunk=16)
        del out
        return sum(found.values())

    assert kept(256) < 2.1 * kept(128)


def test_shapes_that_do_not_fit_are_refused() -> None:
    z = without(inputs(9, groups=2), "state", "diagonal")
    with pytest.raises(UserError, match="heads must be a multiple of groups"):
        ssd(**(z | {"B": z["B"][:, :1].expand(-1, 3, -1, -1), "C": z["C"][:, :1].expand(-1, 3, -1, -1)}))
    with pytest.raises(UserError, match="do not fit at rank 2"):
        ssd(**z, rank=2)
