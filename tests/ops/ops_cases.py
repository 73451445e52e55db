"""Inputs and comparisons shared by the tests of `sisa_dist.ops`."""

import torch

from sisa_dist.ops import sisa_attention

NAMES = ("q", "k", "v", "C", "B", "log_alpha", "theta", "lam")


def make(
    T,
    *,
    batch=2,
    heads=2,
    kv_heads=None,
    d_h=8,
    d_v=None,
    d_s=4,
    decay=0.03,
    dtype=torch.float64,
    aux=None,
    size=1.0,
    theta=1.0,
    seed=0,
):
    """Random inputs of `sisa_attention`: log α uniform in [−decay, 0], C and B of standard deviation `size`.

    Drawn in fp64 and rounded, so that every dtype sees the same numbers up to its own rounding.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    kv_heads, d_v, aux = kv_heads or heads, d_v or d_h, aux or dtype
    x = {
        "q": normal(batch, heads, T, d_h),
        "k": normal(batch, kv_heads, T, d_h),
        "v": normal(batch, kv_heads, T, d_v),
        "C": size * normal(batch, heads, T, d_s),
        "B": size * normal(batch, kv_heads, T, d_s),
        "log_alpha": -decay * torch.rand(batch, kv_heads, T, generator=gen, dtype=torch.float64),
        "theta": theta * normal(batch, kv_heads, T, d_s // 2),
        "lam": 0.1 + torch.rand(heads, generator=gen, dtype=torch.float64),
    }
    return {n: z.to(dtype if n in "qkvCB" else aux).requires_grad_() for n, z in x.items()}


def as_fp64(x):
    return {n: z.detach().double().requires_grad_() for n, z in x.items()}


def cut(x, start, stop):
    """Tokens start … stop−1 of every input."""
    return {n: (z if n == "lam" else z[:, :, start:stop]).detach().requires_grad_() for n, z in x.items()}


def value_and_gradients(x, function=sisa_attention, **kwargs):
    """{"out": …, and the gradient of every input} for one fixed random cotangent."""
    out = function(**x, **kwargs)
    gen = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
    grads = torch.autograd.grad(out, list(x.values()), cotangent, allow_unused=True)
    return {"out": out.detach(), **{n: g for n, g in zip(x, grads, strict=True) if g is not None}}


def assert_close(got, wanted, tolerance, *, floor=0.05):
    """Largest error of each tensor ≤ tolerance × its largest entry (at least `floor`, for gradients that are 0).

    `tolerance` is a number, or one per name with "rest" for the others. NaN and inf fail.
    """
    assert got.keys() == wanted.keys()
    for name, reference in wanted.items():
        if not reference.numel():
            continue
        limit = tolerance if isinstance(tolerance, float) else tolerance.get(name, tolerance["rest"])
        size = max(reference.abs().max().item(), floor)
        error = (got[name].double() - reference.double()).abs().max().item() / size
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"
