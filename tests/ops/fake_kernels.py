"""Stand-ins for kernels that need a GPU: the real signatures and quirks of layout, computed by explicit softmax.

They run on CPU, so that the adapters in sisa_dist.ops.backends are tested everywhere: what is passed, in which layout,
under which name. A call that the real function would refuse or misread fails or gives garbage here too.
"""

import sys
import types
from collections import Counter

import torch


def explicit_forward(q, k, v, *, causal, scale):
    """q [b,h,R,D], k [b,h_kv,S,D], v [b,h_kv,S,E] → out in q's dtype, lse fp32 (fp64 for fp64)."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    score = q @ k.mT * scale
    if causal:
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), float("-inf"))
    return score.softmax(-1) @ v, score.logsumexp(-1)


def explicit_backward(dout, q, k, v, out, lse, *, causal, scale):
    group = q.shape[1] // k.shape[1]
    dout, q, k, v, out, lse = (x.double() for x in (dout, q, k, v, out, lse))
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
    score = q @ wide_k.mT * scale
    if causal:
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), float("-inf"))
    prob = (score - lse[..., None]).exp()
    dscore = prob * (dout @ wide_v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dscore.mT @ q, prob.mT @ dout))
    return dscore @ wide_k, dk, dv


def _bind(op, args, kwargs):
    """Arguments by name, as the operator's real schema takes them in this torch; TypeError if it would not."""
    schema = getattr(torch.ops.aten, op).default._schema
    places = [a for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(places):
        raise TypeError(f"{op} takes {len(places)} positional arguments")
    named = {a.name: value for a, value in zip(places, args, strict=False)}
    known = {a.name for a in schema.arguments}
    if set(kwargs) - known or set(kwargs) & set(named):
        raise TypeError(f"{op}: {set(kwargs)}")
    named.update(kwargs)
    missing = [a.name for a in schema.arguments if a.name not in named and not a.has_default_value()]
    if missing:
        raise TypeError(f"{op} misses {missing}")
    return types.SimpleNamespace(**named)


class FakeAten:
    """`torch.ops.aten` for the CUDA attention kernels. cuDNN's statistics have `cudnn_lse_dims` dimensions."""

    def __init__(self, cudnn_lse_dims=4):
        self.cudnn_lse_dims = cudnn_lse_dims
        self.calls, self.widths = Counter(), set()

    def _bind(self, op, args, kwargs):
        a = _bind(op, args, kwargs)
        self.calls[op] += 1
        self.widths.add((a.query.shape[-1], a.value.shape[-1]))
        return a

    def _scaled_dot_product_flash_attention(self, *args, **kwargs):
        a = self._bind("_scaled_dot_product_flash_attention", args, kwargs)
        assert a.query.shape[-1] == a.value.shape[-1] <= 256 and a.query.shape[-1] % 8 == 0
        out, lse = explicit_forward(a.query, a.key, a.value, causal=a.is_causal, scale=a.scale)
        return out.to(a.query.dtype), lse.float(), None, None, a.query.shape[2], a.key.shape[2], None, None, None

    def _scaled_dot_product_flash_attention_backward(self, *args, **kwargs):
        a = self._bind("_scaled_dot_product_flash_attention_backward", args, kwargs)
        assert a.cum_seq_q is None and (a.max_q, a.max_k) == (a.query.shape[2], a.key.shape[2])
        assert a.grad_out.shape == a.out.shape and a.value.shape == a.key.shape
        return _gradients(a)

    def _scaled_dot_product_cudnn_attention(self, *args, **kwargs):
        a = self._bind("_scaled_dot_product_cudnn_attention", args, kwargs)
        assert a.compute_log_sumexp and a.attn_bias is None
        out, lse = explicit_forward(a.query, a.key, a.value, causal=a.is_causal, scale=a.scale)
        lse = lse.float()[..., None] if self.cudnn_lse_dims == 4 else lse.float()
        return out.to(a.query.dtype), lse, None, None, a.query.shape[2], a.key.shape[2], None, None, None

    def _scaled_dot_product_cudnn_attention_backward(self, *args, **kwargs):
        a = self._bind("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
        assert a.logsumexp.ndim == self.cudnn_lse_dims and a.attn_bias is None
        assert (a.max_q, a.max_k) == (a.query.shape[2], a.key.shape[2])
        a.logsumexp = a.logsumexp.reshape(a.query.shape[:3])
        return _gradients(a)

    def _scaled_dot_product_efficient_attention(self, *args, **kwargs):
        a = self._bind("_scaled_dot_product_efficient_attention", args, kwargs)
        assert a.compute_log_sumexp and a.attn_bias is None and a.query.shape[1] == a.key.shape[1]
        out, lse = explicit_forward(a.query, a.key, a.value, causal=a.is_causal, scale=a.scale)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        return out.to(a.query.dtype), lse.float(), None, None

    def _scaled_dot_product_efficient_attention_backward(self, *args, **kwargs):
        a = self._bind("_scaled_dot_product_efficient_attention_backward", args, kwargs)
        assert a.attn_bias is None and a.query.shape[1] == a.key.shape[1] and len(a.grad_input_mask) == 4
        b, h, R, E = a.out.shape
        assert a.logsumexp.shape == (b, h, R + -R % 32)
        # The kernel computes out's row stride itself.
        strides = (a.out.stride(0), a.out.stride(1), h * E, 1)
        a.out = a.out.as_strided(a.out.shape, strides) if a.out.stride() != strides else a.out
        a.logsumexp, a.grad_out = a.logsumexp[..., :R], a.grad_out_
        return *_gradients(a), None


def _gradients(a):
    grads = explicit_backward(
        a.grad_out, a.query, a.key, a.value, a.out, a.logsumexp, causal=a.is_causal, scale=a.scale
    )
    return tuple(x.to(a.query.dtype) for x in grads)


def _heads_second(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def _two_forward(q, k, v, causal, scale):
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.dtype in (torch.float16, torch.bfloat16)
    out, lse = explicit_forward(*_heads_second(q, k, v), causal=causal, scale=scale)
    return out.to(q.dtype).transpose(1, 2), lse.float()


def _two_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, scale, causal):
    assert softmax_lse.is_contiguous() and softmax_lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert dout.shape == out.shape == q.shape == dq.shape and k.shape == v.shape == dk.shape == dv.shape
    grads = explicit_backward(*_heads_second(dout, q, k, v, out), softmax_lse, causal=causal, scale=scale)
    for target, dx in zip((dq, dk, dv), grads, strict=True):
        target.copy_(dx.transpose(1, 2))


@torch.library.custom_op("fake_flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _backward_2_8(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    assert (window_size_left, window_size_right, softcap, dropout_p) == (-1, -1, 0.0, 0.0)
    _two_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal)
    return softmax_lse.clone()


def _flash_attn_2(version):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        out, lse = _two_forward(q, k, v, causal, softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    def backward_2_5(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        assert window_size == (-1, -1) and alibi_slopes is None
        _two_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal)
        return dq, dk, dv, None

    def backward_2_6(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert window_size == (-1, -1) and softcap == 0.0 and alibi_slopes is None
        _two_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal)
        return dq, dk, dv, None

    backward = {"2.5": backward_2_5, "2.6": backward_2_6, "2.8": _backward_2_8}[version]
    return {"flash_attn_func": flash_attn_func, "_flash_attn_backward": backward}


def _flash_attn_4():
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
    ):  # fmt: skip
        assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0
        out, lse = explicit_forward(*_heads_second(q, k, v), causal=causal, scale=softmax_scale)
        return out.to(q.dtype).transpose(1, 2), lse.float() if return_lse else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert dout.shape == out.shape == (*q.shape[:3], v.shape[-1])
        grads = explicit_backward(*_heads_second(dout, q, k, v, out), lse, causal=causal, scale=softmax_scale)
        return tuple(x.to(q.dtype).transpose(1, 2) for x in grads)

    return {"flash_attn_func": flash_attn_func, "_flash_attn_bwd": _flash_attn_bwd}


def install(monkeypatch, name, version="2.8"):
    """Makes the package importable for one test: flash_attn_2 (version 2.5, 2.6 or 2.8) or flash_attn_4."""
    contents = _flash_attn_2(version) if name == "flash_attn_2" else _flash_attn_4()
    path = "flash_attn.flash_attn_interface" if name == "flash_attn_2" else "flash_attn.cute.interface"
    module = types.ModuleType(path)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, path, module)
