"""Every GPU kernel against the explicit softmax on a real device: `pytest -m gpu tests/ops`.

A kernel is skipped only where its optional package, or the generation of GPU it is written for, is absent.
"""

import pytest
import torch
from ops_cases import as_fp64, assert_close, make, value_and_gradients
from test_backends import check_kernel
from test_score_paths import BF16
from torch.utils.checkpoint import checkpoint

from sisa_dist.ops import causal_attention, sisa_attention
from sisa_dist.ops.backends import explain_backends
from sisa_dist.ops.backends.choice import KERNELS, Case, choose, unfit
from sisa_dist.ops.backends.kernel import round_up

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALF_KERNELS = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn_2", "flash_attn_4")
DOCS = torch.tensor([0] * 130 + [1] * 250 + [2] * 320)[None].expand(2, -1)


def _device():
    return torch.device("cuda", torch.cuda.current_device())


def _needs(name):
    if (reason := KERNELS[name].missing()) is not None:
        pytest.skip(reason)
    if name == "flash_attn_4" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("flash-attn-4 is written for Hopper and later")


def _on_gpu(x):
    return {n: z.detach().to(_device()).requires_grad_() for n, z in x.items()}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("d_qk", "d_v"), [(64, 64), (96, 64), (80, 64), (128, 128), (160, 128), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF_KERNELS)
def test_kernels(name, dtype, d_qk, d_v, group, causal):
    _needs(name)
    case = {"dtype": dtype, "d_qk": d_qk, "d_v": d_v, "group": group, "causal": causal}
    assert unfit(name, Case(_device(), **case)) is None
    for rows, keys in ((150, (70, 130)), (1024, (1024, 512))):
        check_kernel(KERNELS[name], **case, device=_device(), rows=rows, keys=keys)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["sdpa_efficient", "products"])
def test_fp32_kernels(name, causal):
    case = {"dtype": torch.float32, "d_qk": 96, "d_v": 64, "group": 2, "causal": causal}
    assert unfit(name, Case(_device(), **case)) is None
    check_kernel(KERNELS[name], **case, device=_device())


@pytest.mark.parametrize("doc_ids", [None, DOCS])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("backend", ["auto", *HALF_KERNELS])
def test_sisa_and_plain_attention(backend, heads, kv_heads, doc_ids):
    """The whole path in bf16, T no power of two, against the explicit score in fp64."""
    if backend != "auto":
        _needs(backend)
    kinds = {"dtype": torch.bfloat16, "aux": torch.float32}
    x = _on_gpu(make(700, heads=heads, kv_heads=kv_heads, d_h=64, d_s=32, decay=1.0, **kinds))
    doc_ids = None if doc_ids is None else doc_ids.to(_device())
    wanted = value_and_gradients(as_fp64(x), path="dense", doc_ids=doc_ids)
    assert_close(value_and_gradients(x, path="bisected", backend=backend, doc_ids=doc_ids), wanted, BF16)
    qkv = {n: x[n] for n in "qkv"}
    exact = value_and_gradients(as_fp64(qkv), causal_attention, doc_ids=doc_ids)
    got = value_and_gradients(qkv, causal_attention, doc_ids=doc_ids, backend=backend)
    assert_close(got, exact, 2e-2)


@pytest.mark.parametrize("backend", ["auto", *HALF_KERNELS])
def test_one_call(backend):
    if backend != "auto":
        _needs(backend)
    kinds = {"dtype": torch.bfloat16, "aux": torch.float32}
    x = _on_gpu(make(700, heads=4, kv_heads=2, d_h=64, d_s=32, decay=0.01, **kinds))
    wanted = value_and_gradients(as_fp64(x), path="dense")
    assert_close(value_and_gradients(x, path="single", backend=backend), wanted, BF16)


def test_compiled_and_checkpointed():
    x = _on_gpu(make(300, d_h=64, d_s=32, dtype=torch.bfloat16, aux=torch.float32))

    def of(*inputs):
        named = dict(zip(x, inputs, strict=True))
        return sisa_attention(**named) + causal_attention(*inputs[:3])

    def gradients(f):
        return torch.autograd.grad(f(*x.values()).float().square().sum(), list(x.values()))

    plain = gradients(of)
    for f in (torch.compile(of, fullgraph=True), lambda *y: checkpoint(of, *y, use_reentrant=False)):
        for name, a, b in zip(x, gradients(f), plain, strict=True):
            # The kernels' backward adds in no fixed order.
            assert_close({name: a}, {name: b}, 2e-2)


def test_auto_on_this_gpu_is_explained_as_chosen():
    for d_qk, causal in ((96, False), (64, True)):
        found = explain_backends("cuda", torch.bfloat16, d_qk=d_qk, d_v=64, causal=causal)
        for verdict in found:
            print(*verdict)
        case = Case(_device(), torch.bfloat16, round_up(d_qk), 64, 1, causal)
        assert [v.name for v in found if v.chosen] == [choose(case, "auto")]
        assert choose(case, "auto") != "products"
