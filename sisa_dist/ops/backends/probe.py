"""One small comparison of a kernel with plain products in fp64, in everything we use of it: out, lse, dq, dk, dv.

The kernels' operators are private, their shape and hardware limits undocumented, and a wrong lse or a backward that
quietly uses its own softmax instead of the global one gives a model that trains, only worse. So nothing is believed:
the probe has strided views as the bisected path makes them, tails that fill no tile, a global out and lse over keys
the kernel never sees, and rows that take no part. It draws from its own generator and leaves every other alone. It
waits for the device, so it belongs before CUDA graph capture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sisa_dist.ops.backends.kernel import Kernel, pad_to
from sisa_dist.ops.products import products_backward, products_forward

ROWS, KEYS, PAIRS = 176, 208, 2  # of a rectangle; no multiple of a kernel's 64 or 128
NOT_HERE, EXCLUDED = 5, 1e30  # rows that take no part in the backward, and bisect.py's lse of such

# Largest error over the largest entry of out, dq, dk or dv; and nats of lse. 16-bit kernels round P and dS to the
# inputs' type before each product and the results after it: a few roundings of 2^-9 (bf16), 2^-12 (fp16); CPU flash
# measures 1.3e-2 and 1.7e-3, and a kernel that adds heads of a group in 16 bits rounds once more. What must be caught
# is above 1e-1 (tests/ops/test_backends.py). lse is kept in fp32. fp32 kernels of CUDA multiply in three TF32 passes
# (≈ 1e-6; CPU flash 2e-6); a single pass (1e-3) must fail.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-5, torch.float64: 1e-10}
LSE_TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 5e-5, torch.float64: 1e-10}


def disagreement(
    kernel: Kernel, *, device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int, group: int, causal: bool
) -> str | None:
    """What the kernel does wrong at these head widths, in a few words; None where it agrees with the oracle.

    d_qk and d_v multiples of 8 as the kernel will get them; group = query heads a kv head. An exception of the kernel
    is an answer, too: it cannot do this.
    """
    with torch.no_grad():
        try:
            return _compare(kernel, device, dtype, d_qk, d_v, group, causal)
        except Exception as error:  # whatever a foreign kernel raises
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _compare(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int, group: int, causal: bool
) -> str | None:
    gen = torch.Generator().manual_seed(20)
    num_kv, rows = 2, KEYS if causal else ROWS

    def draw(heads: int, width: int) -> Tensor:
        """[PAIRS, heads, KEYS + rows, width], heads outermost in memory, as the bisected path's buffers."""
        x = torch.randn(heads, PAIRS, KEYS + rows, width, generator=gen)
        return x.to(device, dtype).transpose(0, 1)

    heads = group * num_kv
    q, k = draw(heads, d_qk)[:, :, KEYS:], draw(num_kv, d_qk)[:, :, :KEYS]
    v, dout = draw(num_kv, d_v)[:, :, :KEYS], draw(heads, d_v)[:, :, KEYS:]
    scale, (D, E) = d_qk**-0.5, kernel.widths(d_qk, d_v)
    q_hat, k_hat, v_hat, dout_hat = pad_to(q, D), pad_to(k, D), pad_to(v, E), pad_to(dout, E)

    out, lse = kernel.forward(q_hat, k_hat, v_hat, causal=causal, scale=scale)
    # The oracle has heads first, and takes every head of a batch entry for one of its own.
    wide_q, wide_k, wide_v, wide_dout = (x.double().transpose(0, 1) for x in (q, k, v, dout))
    true_out, true_lse = products_forward(wide_q, wide_k, wide_v, scale=scale, causal=causal)
    errors = {"out": _relative(out[..., :d_v], true_out), "lse": float((lse - true_lse.transpose(0, 1)).abs().max())}

    # The rest of the row: other keys, whose softmax is merged in; its first rows attend elsewhere only.
    other = torch.randn(*true_lse.shape, generator=gen, dtype=torch.float64).to(device) + true_lse
    whole = torch.logaddexp(true_lse, other)
    share = (true_lse - whole).exp()[..., None]
    whole_out = (share * true_out + (1 - share) * true_out.flip(2)).to(dtype)
    whole[:, :, :NOT_HERE] = EXCLUDED
    delta = (wide_dout * whole_out).sum(-1)
    wanted = products_backward(wide_dout, wide_q, wide_k, wide_v, whole, delta, scale=scale, causal=causal)
    whole_lse, whole_hat = whole.transpose(0, 1).to(lse.dtype), pad_to(whole_out, E).transpose(0, 1)
    got = kernel.backward(dout_hat, q_hat, k_hat, v_hat, whole_hat, whole_lse, causal=causal, scale=scale)
    if got[0][:, :, :NOT_HERE].any():
        return "rows that take no part get a gradient"
    for name, dx, true, width in zip(("dq", "dk", "dv"), got, wanted, (d_qk, d_qk, d_v), strict=True):
        errors[name] = _relative(dx[..., :width], true)
    for name, error in errors.items():
        limit = (LSE_TOLERANCE if name == "lse" else TOLERANCE)[dtype]
        if not error <= limit:  # NaN included
            return f"{name} differs from plain products by {error:.1e} (allowed {limit:.0e})"
    return None


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.transpose(0, 1)).abs().max() / wanted.abs().max())
