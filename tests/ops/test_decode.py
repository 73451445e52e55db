"""Decoding with a cache is the full run, however the tokens arrive."""

import pytest
import torch
from ops_cases import make

from sisa_dist.config import UserError
from sisa_dist.ops import AttentionCache, SisaCache, causal_attention, sisa_attention
from sisa_dist.ops.decode import GrowingBuffer


def in_chunks(cache, x, chunks):
    outs, start = [], 0
    for t in chunks:
        outs.append(cache.attend(**{n: z if n == "lam" else z[:, :, start : start + t] for n, z in x.items()}))
        start += t
        assert cache.length == start
    return torch.cat(outs, dim=2)


def inputs(T, **kwargs):
    return {n: z.detach() for n, z in make(T, **kwargs).items()}


@pytest.mark.parametrize("chunks", [[1] * 60, [60], [20, 1, 1, 30, 8], [1, 59], [3] * 20])
@pytest.mark.parametrize(("heads", "kv_heads", "d_v", "d_s"), [(2, 2, 8, 4), (4, 2, 12, 6), (4, 1, 8, 0)])
def test_any_chunks_are_the_full_run(heads, kv_heads, d_v, d_s, chunks):
    x = inputs(60, heads=heads, kv_heads=kv_heads, d_v=d_v, d_s=d_s, decay=2.0)
    assert torch.allclose(in_chunks(SisaCache(), x, chunks), sisa_attention(**x, path="dense"), atol=1e-11)
    plain = {n: x[n] for n in "qkv"}
    assert torch.allclose(in_chunks(AttentionCache(), plain, chunks), causal_attention(**plain), atol=1e-12)


@pytest.mark.parametrize("decay", [pytest.param(0.01, marks=pytest.mark.slow), 2.0])
def test_token_by_token_at_4096_with_strong_decay(decay):
    x = inputs(4096, batch=1, heads=2, kv_heads=1, d_h=16, d_s=16, decay=decay, dtype=torch.float32)
    full = sisa_attention(**x)
    assert (in_chunks(SisaCache(), x, [100, *[1] * 3996]) - full).abs().max() < 1e-5


def test_a_long_chunk_after_a_prompt_is_scored_in_rows():
    x = inputs(900, batch=1, decay=0.5, dtype=torch.float32)
    assert (in_chunks(SisaCache(), x, [100, 700, 100]) - sisa_attention(**x)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["sisa", "plain"])
def test_scale_and_dtype_pass_through(kind):
    x = inputs(50, dtype=torch.bfloat16, aux=torch.float32, d_h=32, d_s=16)
    cache, full = (SisaCache(), sisa_attention) if kind == "sisa" else (AttentionCache(), causal_attention)
    if kind == "plain":
        x = {n: x[n] for n in "qkv"}
    wanted = full(**{n: z.double() for n, z in x.items()}, scale=0.4)
    for s in (slice(0, 30), slice(30, 50)):
        out = cache.attend(**{n: z if n == "lam" else z[:, :, s] for n, z in x.items()}, scale=0.4)
        assert out.dtype == torch.bfloat16
        assert (out - wanted[:, :, s]).abs().max() < 2e-2 * wanted.abs().max()


def test_no_graph_is_kept():
    cache = SisaCache()
    x = make(20)
    out = in_chunks(cache, x, [10, 10])
    assert not out.requires_grad


def test_growth_is_amortised():
    buffer, stores = GrowingBuffer(), set()
    for i in range(1000):
        held = buffer.append(torch.full((1, 1, 1, 2), float(i)))
        stores.add(held.data_ptr())
    assert len(stores) <= 11
    assert torch.equal(held[0, 0, :, 0], torch.arange(1000.0))


def test_a_chunk_of_another_shape_is_refused():
    cache = AttentionCache()
    cache.attend(*torch.zeros(3, 2, 2, 4, 8))
    with pytest.raises(UserError, match="does not continue"):
        cache.attend(*torch.zeros(3, 1, 2, 4, 8))
