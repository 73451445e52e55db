"""Forgetting attention against its formula written out, in fp64 and at every dtype, length, decay and packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sisa_dist.config import UserError
from sisa_dist.ops import ForgettingCache, forgetting_attention


def formula(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    L = log_f.cumsum(-1)
    score = q @ k.mT / q.shape[-1] ** 0.5 + L[..., :, None] - L[..., None, :]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    if doc_ids is not None:
        seen = (seen & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]
    return score.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def inputs(T: int, *, kv_heads: int, decay: float, dtype: torch.dtype = torch.float64, d_v: int = 12) -> list[Tensor]:
    """q, k, v in `dtype`, log f uniform in [−decay, 0] in at least fp32."""
    gen = torch.Generator().manual_seed(T)
    shapes = ((2, 4, T, 8), (2, kv_heads, T, 8), (2, kv_heads, T, d_v))
    qkv = [torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes]
    log_f = -decay * torch.rand(2, 4, T, generator=gen, dtype=torch.float64)
    return [*qkv, log_f.to(torch.float64 if dtype == torch.float64 else torch.float32)]


def documents(T: int) -> Tensor:
    return (torch.rand(2, T, generator=torch.Generator().manual_seed(T)) < 0.1).cumsum(1)


def with_gradients(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(torch.bfloat16).to(out.dtype))]


def worst(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Largest error of out and the gradients of q, k, v, log f over their largest entry, at least 0.05."""
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=0.05)).item() for a, b in zip(got, wanted, strict=True)
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [0.01, 1.0, 60.0])  # nats a token; at 60 the whole sequence spans 3000
@pytest.mark.parametrize(("T", "leaf"), [(1, 4), (37, 4), (101, 16), (33, 64)])
def test_it_is_the_formula_with_every_gradient(T: int, leaf: int, decay: float, packed: bool, kv_heads: int) -> None:
    doc_ids = documents(T) if packed else None
    x = inputs(T, kv_heads=kv_heads, decay=decay)
    got = with_gradients(forgetting_attention, x, doc_ids=doc_ids, leaf=leaf)
    assert max(worst(got, with_gradients(formula, x, doc_ids=doc_ids))) < 1e-12


# bf16: P and dS are rounded to 8 bits before each product, and dk̂, whose bias channel is log f's gradient, after it.
TOLERANCES = {
    torch.float32: (1e-6, 1e-5, 1e-5),
    torch.bfloat16: (5e-3, 1.2e-2, 4e-2),
    torch.float16: (2e-3, 2e-3, 1e-2),
}


@pytest.mark.parametrize("backend", ["auto", "cpu_flash", "products"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("decay", [0.05, 3.0])
def test_narrow_dtypes_stay_near_fp64(dtype: torch.dtype, decay: float, backend: str) -> None:
    x, doc_ids = inputs(130, kv_heads=2, decay=decay, dtype=dtype, d_v=8), documents(130)
    got = with_gradients(forgetting_attention, x, doc_ids=doc_ids, leaf=16, backend=backend)
    out, *qkv, log_f = worst(got, with_gradients(formula, [z.double() for z in x], doc_ids=doc_ids))
    limits = TOLERANCES[dtype]
    assert out < limits[0] and max(qkv) < limits[1] and log_f < limits[2]


def test_bf16_keeps_a_bias_that_content_stands_against() -> None:
    """Keys up to 60 nats down whose content is as many nats up: with 8 bits their weights would be off by a tenth."""
    T = 128
    q, k, v, _ = inputs(T, kv_heads=4, decay=0.0, dtype=torch.bfloat16)
    log_f = torch.full((2, 4, T), -0.93)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, :64, 0] = 0.93 / 8**0.5 * torch.arange(63.0, -1.0, -1.0)
    x = [q, k, v, log_f]
    got = with_gradients(forgetting_attention, x, leaf=16)
    assert worst(got, with_gradients(formula, [z.double() for z in x]))[0] < 5e-3


def test_masked_keys_have_exactly_no_gradient() -> None:
    x, doc_ids = inputs(60, kv_heads=2, decay=0.5), torch.arange(60).div(20, rounding_mode="floor").expand(2, 60)
    leaves = [z.requires_grad_() for z in x]
    out = forgetting_attention(*leaves, doc_ids=doc_ids, leaf=8)
    for gradient in torch.autograd.grad(out[:, :, 20:40].sum(), leaves):
        assert not gradient[:, :, :20].any() and not gradient[:, :, 40:].any() and gradient[:, :, 21:40].any()


@pytest.mark.parametrize("decay", [0.01, 40.0])
def test_any_chunks_of_a_cache_are_the_full_run(decay: float) -> None:
    x = inputs(300, kv_heads=2, decay=decay)
    full = forgetting_attention(*x)
    for chunks in ([300], [7, 1, 260, 32], [1] * 300):
        cache = ForgettingCache()
        parts = [cache.attend(*part) for part in zip(*(z.split(chunks, 2) for z in x), strict=True)]
        assert cache.length == 300 and (torch.cat(parts, 2) - full).abs().max() < 1e-11


def test_a_long_generation_keeps_its_precision() -> None:
    """fp32 with 20 000 nats behind: a running sum in fp32 would be off by a thousandth of a nat a token."""
    x = inputs(4000, kv_heads=4, decay=10.0, dtype=torch.float32)
    full = formula(*(z[:, :, -200:].double() for z in x))  # what lies further back weighs e^-900 and less
    cache = ForgettingCache()
    cache.attend(*(z[:, :, :3990] for z in x))
    last = torch.cat([cache.attend(*(z[:, :, t : t + 1] for z in x)) for t in range(3990, 4000)], 2)
    assert (last - full[:, :, -10:]).abs().max() < 2e-6


def test_the_operator_is_one_to_compile_and_counters() -> None:
    x = [z.requires_grad_() for z in inputs(24, kv_heads=2, decay=0.5)]
    q, k, v, log_f = x
    arguments = (q, k, v, log_f, None, 0.3, 8, "auto")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.sisa_dist.forgetting.default, arguments, test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        forgetting_attention(*x).sum().backward()
    pairs = 2 * 4 * 24 * 25 // 2
    assert counter.get_total_flops() == 2 * pairs * (8 + 12) + 2 * pairs * (3 * 8 + 2 * 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, f: (q, k, v, f[:, :2]), "every query head has its own log_f"),
        (lambda q, k, v, f: (q, k, v[:, :, :-1], f), "do not fit"),
        (lambda q, k, v, f: (q[:, :3], k, v, f[:, :3]), "must divide H"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        forgetting_attention(*change(*inputs(8, kv_heads=2, decay=1.0)))
