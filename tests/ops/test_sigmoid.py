"""Sigmoid SISA against its formula written out: every length, decay, packing and tile, gradients and decoding."""

from __future__ import annotations

import pytest
import torch
from ops_cases import as_fp64, assert_close, make, value_and_gradients
from torch.utils.flop_counter import FlopCounterMode

from sisa_dist.config import AttentionConfig, UserError
from sisa_dist.model.mixers.sigmoid_sisa import SigmoidScore
from sisa_dist.ops import SigmoidSisaCache, sigmoid, sigmoid_sisa_attention


def formula(q, k, v, C, B, log_alpha, theta, lam, doc_ids=None):
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v, B, log_alpha, theta = (x.repeat_interleave(group, 1) for x in (k, v, B, log_alpha, theta))
    g, turn = log_alpha.cumsum(-1), torch.exp(1j * theta.cumsum(2))
    C, B = (torch.view_as_complex(z.unflatten(-1, (-1, 2))) * turn for z in (C, B))
    decay = (g[..., :, None] - g[..., None, :]).clamp(max=0).exp()
    score = q @ k.mT / q.shape[-1] ** 0.5 + lam[:, None, None] * decay * (C @ B.mH).real
    ids = torch.zeros(1, T) if doc_ids is None else doc_ids
    seen = torch.ones(T, T, dtype=torch.bool).tril() & (ids[:, :, None] == ids[:, None, :])
    weight = torch.sigmoid(score - seen.sum(-1).double().log()[:, None, :, None]) * seen[:, None]
    return weight @ v


def documents(T):
    return (torch.rand(2, T, generator=torch.Generator().manual_seed(T)) < 0.1).cumsum(1)


@pytest.mark.parametrize("heads_of", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [0.01, 1.0, 60.0])
@pytest.mark.parametrize(("T", "leaf"), [(1, 4), (37, 4), (101, 16), (33, 64)])
def test_it_is_the_formula_with_every_gradient(T, leaf, decay, packed, heads_of, monkeypatch):
    monkeypatch.setattr(sigmoid, "CPU_CHUNK", 100)  # a rectangle is several tiles of rows
    x, doc_ids = make(T, heads=2, kv_heads=2 // heads_of, d_v=12, decay=decay), documents(T) if packed else None
    got = value_and_gradients(x, sigmoid_sisa_attention, doc_ids=doc_ids, leaf=leaf)
    # log α and θ are rounded by up to 1e-13 before they are summed (spans.py).
    assert_close(got, value_and_gradients(x, formula, doc_ids=doc_ids), 1e-11)


# bf16 inputs: q̂ and k̂ are rounded once more after the rotation, all else is fp32.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, {"log_alpha": 5e-2, "theta": 5e-2, "lam": 3e-2, "rest": 1.5e-2})],
)
def test_narrow_dtypes_stay_near_fp64(dtype, tolerance):
    x, doc_ids = make(130, kv_heads=1, decay=0.5, dtype=dtype, aux=torch.float32), documents(130)
    got = value_and_gradients(x, sigmoid_sisa_attention, doc_ids=doc_ids, leaf=16)
    assert_close(got, value_and_gradients(as_fp64(x), formula, doc_ids=doc_ids), tolerance)


def test_another_document_has_exactly_no_part():
    x, doc_ids = make(60, decay=0.5), torch.arange(60).div(20, rounding_mode="floor").expand(2, 60)
    out = sigmoid_sisa_attention(**x, doc_ids=doc_ids, leaf=8)
    lam = x.pop("lam")
    for gradient in torch.autograd.grad(out[:, :, 20:40].sum(), list(x.values())):
        assert not gradient[:, :, :20].any() and not gradient[:, :, 40:].any() and gradient[:, :, 21:40].any()
    with torch.no_grad():
        for z in x.values():
            z[:, :, :20] = -z[:, :, :20].abs()
    assert torch.equal(sigmoid_sisa_attention(**x, lam=lam, doc_ids=doc_ids, leaf=8)[:, :, 20:], out[:, :, 20:])


@pytest.mark.parametrize("chunks", [[300], [7, 1, 260, 32], [1] * 300])
def test_any_chunks_of_a_cache_are_the_full_run(chunks):
    x = {n: z.detach() for n, z in make(300, kv_heads=1, decay=0.3).items()}
    lam, cache = x.pop("lam"), SigmoidSisaCache()
    parts = zip(*(z.split(chunks, 2) for z in x.values()), strict=True)
    out = torch.cat([cache.attend(*part, lam) for part in parts], 2)
    assert cache.length == 300 and (out - sigmoid_sisa_attention(**x, lam=lam)).abs().max() < 1e-11


def test_the_operator_is_one_to_compile_and_counters():
    x = make(24, kv_heads=1)
    arguments = (*x.values(), None, 0.3, 8)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.sisa_dist.sigmoid_sisa.default, arguments, test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        sigmoid_sisa_attention(**x).sum().backward()
    pairs = 2 * 2 * 24 * 25 // 2
    assert counter.get_total_flops() == 2 * pairs * (8 + 4 + 8) + 2 * pairs * (3 * (8 + 4) + 2 * 8)


@pytest.mark.parametrize("setting", [{"path": "single"}, {"path": "dense"}, {"backend": "cpu_flash"}])
def test_paths_and_kernels_of_the_softmax_are_refused(setting):
    with pytest.raises(UserError, match="cannot compute the mixer sigmoid_sisa: set it to auto"):
        SigmoidScore(AttentionConfig(**setting))
