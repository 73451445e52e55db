"""The geometry and the sums under the bisected path."""

import math

import pytest
import torch

from sisa_dist.ops.backends import Rows, attend, attend_backward
from sisa_dist.ops.documents import Segments, suffix_sums
from sisa_dist.ops.spans import decay_sums, levels, phase_turns


@pytest.mark.parametrize("leaf", [1, 3, 8, 64])
@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8, 13, 16, 31])
def test_leaves_and_levels_tile_the_past_exactly_once(leaf, leaves):
    T = leaf * leaves
    seen = torch.zeros(T, T, dtype=torch.int)
    for start in range(0, T, leaf):
        seen[start : start + leaf, start : start + leaf] += torch.ones(leaf, leaf, dtype=torch.int).tril()
    place = torch.arange(T)[None]
    for level in levels(T, leaf):
        for queries, keys in zip(level.odd(place)[0], level.even(place)[0], strict=True):
            seen[queries[:, None], keys] += 1
    assert torch.equal(seen, torch.ones(T, T, dtype=torch.int).tril())


@pytest.mark.parametrize("work", [torch.float32, torch.float64])
def test_what_came_before_moves_no_bit_of_a_difference(work):
    gen = torch.Generator().manual_seed(0)
    before, ours = (-torch.rand(1, 1, n, generator=gen, dtype=work) for n in (700, 300))
    alone, packed = decay_sums(ours, work=work), decay_sums(torch.cat((before, ours), 2), work=work)[:, :, 700:]
    assert torch.equal(alone - alone[..., :1], packed - packed[..., :1])
    theta_before, theta = (9 * torch.randn(1, 1, n, 3, generator=gen, dtype=work) for n in (700, 300))
    first = torch.cat((torch.zeros(1, 700, dtype=torch.long), torch.full((1, 300), 700)), 1)
    packed = phase_turns(torch.cat((theta_before, theta), 2), first, work=work)[:, :, 700:]
    assert torch.equal(packed, phase_turns(theta, torch.zeros(1, 300, dtype=torch.long), work=work))


def test_inputs_are_left_alone():
    x = torch.randn(1, 1, 5, 2, dtype=torch.float64)
    copy = x.clone()
    phase_turns(x, None, work=torch.float64), decay_sums(x[..., 0], work=torch.float64)
    assert torch.equal(x, copy)


def test_phases_are_right_after_millions_of_radians():
    """A constant θ has a closed form; an fp32 running sum would be wrong by radians here."""
    theta = torch.full((1, 1, 200_000, 1), 31.25, dtype=torch.float32)
    turns = phase_turns(theta, None, work=torch.float32).double()[0, 0, :, 0]
    exact = torch.arange(1, 200_001, dtype=torch.float64) * (31.25 / (2 * math.pi))
    error = turns - exact
    assert (error - error.round()).abs().max() < 2e-7
    assert turns.abs().max() <= 0.5


def test_suffix_sums_stop_at_document_edges():
    doc = torch.tensor([[0, 0, 0, 3, 4, 4, 4]])
    x = torch.tensor([[[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]]])
    assert suffix_sums(x, Segments.of(doc)).tolist() == [[[0, 6, 4, 0, 0, 96, 64]]]
    assert suffix_sums(x, None).tolist() == [[[0, 126, 124, 120, 112, 96, 64]]]
    with_pairs = suffix_sums(x[..., None].expand(1, 1, 7, 2), Segments.of(doc))
    assert with_pairs[..., 1].tolist() == [[[0, 6, 4, 0, 0, 96, 64]]]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backends_agree_and_excluded_rows_give_nothing(dtype, group):
    """CPU flash, fed global out and lse, against the products; lse = 1e30 must be worth exactly zero."""
    gen = torch.Generator().manual_seed(0)

    def normal(*shape, live=16):
        x = torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)
        x[..., live:] = 0
        return x

    q, dout, out = normal(2 * group, 3, 40, 24, live=24), normal(2 * group, 3, 40, 24), normal(2 * group, 3, 40, 24)
    k, v = normal(2, 3, 70, 24, live=24), normal(2, 3, 70, 24)
    results = {}
    for name in ("products", "cpu_flash"):
        far_out, far_lse = attend(q, k, v, d_v=16, scale=0.3, backend=name)
        lse = far_lse + 0.5
        lse[:, :, 30:] = 1e30
        rows = Rows(dout, out, lse, (dout * out).sum(-1))
        grads = attend_backward(rows, q, k, v, d_v=16, scale=0.3, backend=name)
        assert (grads.q[:, :, 30:] == 0).all()
        fewer = Rows(*(x[:, :, :30] for x in rows))
        short = attend_backward(fewer, q[:, :, :30], k, v, d_v=16, scale=0.3, backend=name)
        results[name] = [far_out[..., :16], far_lse, grads.q, grads.k, grads.v[..., :16], short.k, short.v[..., :16]]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for a, b in zip(*results.values(), strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=tolerance)
    for grads in results.values():
        assert torch.allclose(grads[3], grads[5], atol=tolerance)
        assert torch.allclose(grads[4], grads[6], atol=tolerance)
