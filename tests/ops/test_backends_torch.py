"""What torch_kernels.py assumes of PyTorch's private operators, checked against this version's shape functions.

The CUDA kernels cannot run here, but their schemas and meta implementations can: a renamed argument, another order or
another shape of lse fails here before it fails on a GPU.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sisa_dist.ops.backends import torch_kernels
from sisa_dist.ops.backends.choice import KERNELS

n, M, N, R, S, D, E = 3, 6, 2, 40, 72, 96, 64


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, device="meta", dtype=dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient"])
def test_schemas_and_shapes(name, causal):
    kernel, rows = KERNELS[name], S if causal else R
    width = kernel.widths(D, E)[1]
    # Heads outermost in memory, as the bisected path has them.
    q, k, v = (_meta(h, n, t, w).transpose(0, 1) for h, t, w in ((M, rows, D), (N, S, D), (N, S, width)))
    out, lse = kernel.forward(q, k, v, causal=causal, scale=0.1)
    assert out.shape == (n, M, rows, width) and out.dtype == q.dtype
    assert lse.shape == (n, M, rows) and lse.dtype == torch.float32
    dout, out = (_meta(M, n, rows, width).transpose(0, 1) for _ in range(2))
    grads = kernel.backward(dout, q, k, v, out, lse, causal=causal, scale=0.1)
    assert [dx.shape for dx in grads] == [q.shape, k.shape, v.shape]


def test_cudnn_statistics_go_back_as_they_came(monkeypatch):
    """Whether [b, h, R] or [b, h, R, 1]: what this torch's own autograd would hand the backward."""
    q, v = _meta(n, M, R, D), _meta(n, M, R, E)
    real = torch.ops.aten._scaled_dot_product_cudnn_attention
    raw = real(q, q, v, None, True, 0.0, False, False, scale=0.1)[1]
    seen = []

    class Aten:
        _scaled_dot_product_cudnn_attention = staticmethod(real)

        @staticmethod
        def _scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, lse, *_, **__):
            seen.append(lse)

    monkeypatch.setattr(torch_kernels, "aten", Aten)
    out, lse = KERNELS["sdpa_cudnn"].forward(q, q, v, causal=False, scale=0.1)
    KERNELS["sdpa_cudnn"].backward(out, q, q, v, out, lse, causal=False, scale=0.1)
    assert seen[0].shape == raw.shape and seen[0].stride() == raw.stride()


def test_efficient_attention_reads_out_by_its_own_strides_and_lse_in_blocks_of_32(monkeypatch):
    seen = {}

    class Aten:
        @staticmethod
        def _scaled_dot_product_efficient_attention_backward(dout, q, k, v, bias, out, lse, *_, **__):
            seen.update(out=out, lse=lse)
            return torch.zeros_like(q), torch.ones_like(k), torch.ones_like(v), None

    monkeypatch.setattr(torch_kernels, "aten", Aten)
    q, k, v = torch.randn(n, M, R, D), torch.randn(n, N, S, D), torch.randn(n, N, S, E)
    out = torch.randn(M, n, R, E).transpose(0, 1)
    lse = torch.randn(n, M, R)
    _, dk, _ = KERNELS["sdpa_efficient"].backward(out, q, k, v, out, lse, causal=False, scale=0.1)
    assert seen["out"].stride()[1:] == (E, M * E, 1) and torch.equal(seen["out"], out)
    assert seen["lse"].shape == (n, M, 64) and seen["lse"].is_contiguous()
    assert torch.equal(seen["lse"][..., :R], lse) and torch.isinf(seen["lse"][..., R:]).all()
    assert dk.shape == k.shape and (dk == M // N).all()  # summed over the heads of a group


def test_flop_formulas_of_torch_take_our_calls():
    """The counters the estimates rest on know these operators with our arguments."""
    q, k = _meta(n, M, R, D), _meta(n, M, S, D)
    with FlopCounterMode(display=False) as counter:
        KERNELS["sdpa_flash"].forward(q, k, k, causal=False, scale=0.1)
    assert counter.get_total_flops() == 2 * 2 * n * M * R * S * D
