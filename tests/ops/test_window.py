"""Window attention with sinks against softmax over an explicit mask, in fp64: values, gradients, documents, a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops import WindowCache, window_attention

B, H, KV, D, V = 2, 4, 2, 6, 9


def inputs(T: int, *, dtype: torch.dtype = torch.float64, v_dim: int = V) -> list[Tensor]:
    g = torch.Generator().manual_seed(T)
    shapes = (B, H, T, D), (B, KV, T, D), (B, KV, T, v_dim)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def seen(T: int, window: int, sinks: int, doc_ids: Tensor | None) -> Tensor:
    """[B, T, T], token by token."""
    mask = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        ids = [0] * T if doc_ids is None else doc_ids[b].tolist()
        for i in range(T):
            first = ids.index(ids[i])
            for j in range(first, i + 1):
                mask[b, i, j] = i - j < window or j - first < sinks
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    score = (q @ k.mT / D**0.5).masked_fill(~mask[:, None], -torch.inf)
    return score.softmax(-1) @ v


def documents(T: int) -> Tensor:
    """Long ones, several within a block, of one token; other borders in the other row."""
    lengths = [1, 2, 3, 14, 1, 1, 20]
    rows = [torch.repeat_interleave(torch.arange(7), torch.tensor(row)) for row in (lengths, lengths[::-1])]
    return torch.stack(rows)[:, :T]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (5, 3), (1, 1), (8, 8), (3, 10), (41, 3), (42, 2)])
@pytest.mark.parametrize("T", [42, 17])
def test_it_is_softmax_over_what_is_visible(T: int, window: int, sinks: int, packed: bool) -> None:
    (q, k, v), doc_ids = inputs(T), documents(T) if packed else None
    mask = seen(T, window, sinks, doc_ids)
    want, got = dense(q, k, v, mask), window_attention(q, k, v, window=window, sinks=sinks, doc_ids=doc_ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    direction = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad((y * direction).sum(), [q, k, v]) for y in (got, want)), strict=True)
    assert all((a - b).abs().max() < 1e-12 * b.abs().max() for a, b in pairs)


def test_what_is_hidden_has_no_influence_at_all() -> None:
    (q, k, v), doc_ids = inputs(42), documents(42)
    y = window_attention(q, k, v, window=5, sinks=2, doc_ids=doc_ids)
    mask, i = seen(42, 5, 2, doc_ids), 35
    dk, dv = torch.autograd.grad(y[:, :, i].square().sum(), [k, v])
    assert all(not x.transpose(1, 2)[~mask[:, i]].any() for x in (dk, dv))


@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (5, 3), (1, 2), (60, 3)])
@pytest.mark.parametrize("chunks", [[1] * 42, [42], [2, 1, 30, 9], [20, 22]])
def test_a_cache_gives_what_the_whole_gives(window: int, sinks: int, chunks: list[int]) -> None:
    q, k, v = (x.detach() for x in inputs(42))
    want = window_attention(q, k, v, window=window, sinks=sinks)
    cache = WindowCache(window=window, sinks=sinks)
    parts = zip(*(x.split(chunks, dim=2) for x in (q, k, v)), strict=True)
    got = torch.cat([cache.attend(*part) for part in parts], dim=2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert cache.length == 42
    assert cache._last is not None and cache._last[0].shape[2] == min(42, window - 1), "a cache of one size"


def test_16_bit_and_equal_widths() -> None:
    q, k, v = (x.detach() for x in inputs(42, dtype=torch.bfloat16, v_dim=D))
    got = window_attention(q, k, v, window=5, sinks=2)
    want = dense(q.double(), k.double(), v.double(), seen(42, 5, 2, None))
    assert got.dtype == torch.bfloat16 and (got.double() - want).abs().max() < 2e-2


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs(17)
    with pytest.raises(UserError, match="do not fit"):
        window_attention(q, k[:, :, :9], v, window=5)
