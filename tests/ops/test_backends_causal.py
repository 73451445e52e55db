"""`attention.backend` through the public functions: same values, same gradients, and out of the way of compile."""

import math

import pytest
import torch
from fake_kernels import FakeAten
from ops_cases import assert_close, make, value_and_gradients
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sisa_dist.config import AttentionConfig, ModelConfig, UserError
from sisa_dist.model.lm import build_model
from sisa_dist.ops import causal_attention, sisa_attention
from sisa_dist.ops.backends import choice, torch_kernels
from sisa_dist.ops.backends.causal import _causal, _causal_backward
from sisa_dist.ops.backends.probe import disagreement

SHAPES = [{}, {"heads": 4, "kv_heads": 2, "d_v": 20}, {"heads": 3, "kv_heads": 1, "d_h": 12}]
DOCS = torch.tensor([0] * 30 + [1] * 50 + [2] * 20)[None].expand(2, -1)


def _qkv(*args, **kwargs):
    x = make(*args, **kwargs)
    return {name: x[name] for name in "qkv"}


@pytest.fixture
def gpu_kernels_on_cpu(monkeypatch):
    """PyTorch's CUDA kernels as stand-ins that run, and may be named, on CPU; flash_attn ones stay absent."""
    aten = FakeAten()
    monkeypatch.setattr(torch_kernels, "aten", aten)
    for name in ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient"):
        kernel = choice.KERNELS[name]
        monkeypatch.setitem(choice.KERNELS, name, kernel._replace(device="cpu", dtypes=choice.FLOATS))
    caches = (torch_kernels._cudnn_lse_dims, choice.unfit, choice.choose)
    for cached in caches:
        cached.cache_clear()
    yield aten
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("doc_ids", [None, DOCS])
@pytest.mark.parametrize("backend", ["cpu_flash", "products"])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention_is_the_same_by_every_backend(shape, backend, doc_ids):
    x = _qkv(100, **shape)
    wanted = value_and_gradients(x, causal_attention, doc_ids=doc_ids)
    assert_close(value_and_gradients(x, causal_attention, doc_ids=doc_ids, backend=backend), wanted, 1e-12)


@pytest.mark.parametrize("doc_ids", [None, DOCS])
@pytest.mark.parametrize("backend", ["cpu_flash", "products"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sisa_is_the_same_by_every_backend(shape, backend, doc_ids):
    x = make(100, **shape)
    wanted = value_and_gradients(x, path="dense", doc_ids=doc_ids)
    got = value_and_gradients(x, path="bisected", leaf=16, backend=backend, doc_ids=doc_ids)
    assert_close(got, wanted, 1e-10)
    if doc_ids is None:
        assert_close(value_and_gradients(x, path="single", backend=backend), wanted, 1e-10)


@pytest.mark.parametrize("doc_ids", [None, DOCS])
@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bisected_path_hands_gpu_kernels_what_they_want(gpu_kernels_on_cpu, shape, backend, doc_ids):
    """Padded v where one width is wanted, d_v where not, strided views, a global lse with rows that take no part."""
    x = make(100, dtype=torch.float32, **shape)
    wanted = value_and_gradients(x, path="dense", doc_ids=doc_ids)
    settings = {"path": "bisected", "leaf": 16, "backend": backend, "doc_ids": doc_ids}
    assert_close(value_and_gradients(x, **settings), wanted, 1e-4)  # the first time the probe calls, too
    aten = gpu_kernels_on_cpu
    aten.calls.clear()
    aten.widths.clear()
    value_and_gradients(x, **settings)
    op = f"_scaled_dot_product_{backend.removeprefix('sdpa_')}_attention"
    assert aten.calls == {
        op: 4,
        f"{op}_backward": 4,
    }  # T 112 in leaves of 16: levels of 3, 1, 1 (cut short) and 1 pairs
    ((d_qk, width),) = aten.widths
    assert d_qk % 8 == 0 and width == (d_qk if backend == "sdpa_flash" else -(-x["v"].shape[-1] // 8) * 8)

    qkv = {name: x[name] for name in "qkv"}
    wanted = value_and_gradients(qkv, causal_attention, doc_ids=doc_ids)
    settings = {"doc_ids": doc_ids, "backend": backend}
    assert_close(value_and_gradients(qkv, causal_attention, **settings), wanted, 1e-4)
    aten.calls.clear()
    value_and_gradients(qkv, causal_attention, **settings)
    assert aten.calls == {op: 1, f"{op}_backward": 1}  # one call, or with documents one rectangle beside the leaves


def test_the_cpu_is_not_probed(monkeypatch):
    def probe(*_, **__):
        raise AssertionError("a probe on CPU")

    monkeypatch.setattr(choice, "disagreement", probe)
    for cached in (choice.unfit, choice.choose):
        cached.cache_clear()
    x = make(200, dtype=torch.float32)
    for backend in ("auto", "cpu_flash", "products"):
        sisa_attention(**x, leaf=16, backend=backend).sum().backward()
        causal_attention(x["q"], x["k"], x["v"], backend=backend).sum().backward()


def test_probes_do_not_reach_the_graph_or_the_flop_count(gpu_kernels_on_cpu, monkeypatch):
    probes = []

    def counted(kernel, **case):
        probes.append(case)
        return disagreement(kernel, **case)

    monkeypatch.setattr(choice, "disagreement", counted)
    x = make(70, dtype=torch.float32)

    def of(**x):
        y = sisa_attention(**x, path="bisected", leaf=16, backend="sdpa_cudnn")
        return y + causal_attention(x["q"], x["k"], x["v"], backend="sdpa_cudnn")

    got = value_and_gradients(x, torch.compile(of, backend="aot_eager", fullgraph=True))
    assert len(probes) == 2 and probes[0]["causal"] != probes[1]["causal"]
    assert_close(got, value_and_gradients(x, of), 1e-6)
    assert len(probes) == 2
    counts = []
    for cached in (choice.unfit, choice.choose):
        cached.cache_clear()
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            value_and_gradients(x, of)
        counts.append(counter.get_total_flops())
    assert len(probes) == 4 and counts[0] == counts[1]


def test_gradcheck():
    x = _qkv(9, heads=4, kv_heads=2, d_v=6)
    assert torch.autograd.gradcheck(lambda *x: causal_attention(*x, backend="products"), tuple(x.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x = _qkv(11, heads=4, kv_heads=2, d_v=6, dtype=dtype)
    torch.library.opcheck(_causal, (*x.values(), 0.3, "products"))
    q, k, v = (z.detach() for z in x.values())
    out, lse = _causal(q, k, v, 0.3, "products")
    arguments = (torch.ones_like(out), q, k, v, out, lse, 0.3, "products")
    torch.library.opcheck(_causal_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_and_autocast(use_reentrant):
    x = _qkv(70, dtype=torch.float32)

    def of(q, k, v):
        return causal_attention(q, k, v, backend="products").square()

    plain = torch.autograd.grad(of(**x).sum(), list(x.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = checkpoint(of, *x.values(), use_reentrant=use_reentrant).sum()
        loss.backward()
    assert all(torch.equal(g, z.grad) for g, z in zip(plain, x.values(), strict=True))


def test_flops_are_half_of_the_square():
    T, d_v = 128, 24
    x = _qkv(T, heads=4, kv_heads=2, d_h=16, d_v=d_v, dtype=torch.float32)
    square = 2 * 4 * T * T * 2  # batch · heads · pairs · (multiply, add)
    with FlopCounterMode(display=False) as forward:
        out = causal_attention(**x, backend="products")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert math.isclose(forward.get_total_flops(), square / 2 * (16 + d_v), rel_tol=0.01)
    assert math.isclose(backward.get_total_flops(), square / 2 * (3 * 16 + 2 * d_v), rel_tol=0.01)


def test_second_derivatives_are_refused():
    x = _qkv(9)
    (dq,) = torch.autograd.grad(causal_attention(**x, backend="products").sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), x["k"])


def test_a_backend_that_cannot_serve_says_so():
    x = make(20)
    qkv = x["q"], x["k"], x["v"]
    with pytest.raises(UserError, match="sdpa_flash runs on cuda only: on cpu set auto or cpu_flash or products"):
        sisa_attention(**x, backend="sdpa_flash")
    with pytest.raises(UserError, match="flash_attn_2 runs on cuda only"):
        causal_attention(*qkv, backend="flash_attn_2")
    with pytest.raises(UserError, match="'flash' is unknown"):
        causal_attention(*qkv, backend="flash")
    with pytest.raises(UserError, match=r"dense has no backends: remove attention.backend cpu_flash"):
        sisa_attention(**x, path="dense", backend="cpu_flash")


@pytest.mark.parametrize("backend", ["auto", "sdpa_flash", "products"])
def test_a_gpu_config_can_be_shaped_on_meta(backend):
    """No kernel is chosen there: what a model on the meta device is built for is estimates."""
    x = {n: z.detach().to("meta") for n, z in make(40, heads=4, kv_heads=2, d_v=6, dtype=torch.float32).items()}
    assert sisa_attention(**x, backend=backend).shape == (*x["q"].shape[:3], 6)
    assert causal_attention(x["q"], x["k"], x["v"], backend=backend).shape == (*x["q"].shape[:3], 6)


def test_a_refusal_at_run_time_is_still_a_user_error(gpu_kernels_on_cpu):
    """It comes from inside the operator, eager or compiled."""
    x = make(40, d_h=264, dtype=torch.float32)
    for f in (sisa_attention, torch.compile(sisa_attention, backend="aot_eager")):
        with pytest.raises(UserError, match="takes heads up to 256 channels, not 272"):
            f(**x, path="bisected", leaf=16, backend="sdpa_flash")


@pytest.mark.parametrize("mixer", ["sisa", "attention"])
def test_the_config_key_reaches_both_mixers(mixer):
    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 32}
    config = ModelConfig(**sizes, mixer=mixer, d_s=8 if mixer == "sisa" else None)
    tokens = torch.arange(48)[None] % 64
    losses = []
    for backend in ("auto", "products"):
        model = build_model(config, attention=AttentionConfig(backend=backend, path="auto", leaf=8), seed=3)
        losses.append(model(tokens, tokens)[0].item())
    assert math.isclose(*losses, rel_tol=1e-6)
    model = build_model(config, attention=AttentionConfig(backend="sdpa_cudnn"), seed=3)
    with pytest.raises(UserError, match="sdpa_cudnn runs on cuda only"):
        model(tokens, tokens)
