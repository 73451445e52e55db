"""The probe believes nothing: every kernel is right against an explicit softmax, and every wrong one is refused."""

import sys
import typing

import pytest
import torch
from fake_kernels import FakeAten, explicit_backward, explicit_forward, install

from sisa_dist.config import AttentionConfig, UserError
from sisa_dist.ops.backends import NAMES, check_name, choice, explain_backends, packages, torch_kernels
from sisa_dist.ops.backends.choice import KERNELS, Case, choose, unfit
from sisa_dist.ops.backends.kernel import FLOATS, Kernel, pad_to
from sisa_dist.ops.backends.probe import TOLERANCE, disagreement

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GPU_KERNELS = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn_2", "flash_attn_4")
WIDTHS = [(96, 64), (64, 64), (40, 64), (168, 128)]  # d_qk, d_v: SISA's differ by d_s


@pytest.fixture(autouse=True)
def _fresh_caches():
    caches = (packages._missing, torch_kernels._cudnn_lse_dims, unfit, choose)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def fake(monkeypatch):
    """Kernels that need a GPU, on CPU: fake(name, …) returns the adapter over a stand-in of its library."""

    def make(name, **kwargs):
        if name.startswith("flash_attn"):
            install(monkeypatch, name, **kwargs)
        else:
            monkeypatch.setattr(torch_kernels, "aten", FakeAten(**kwargs))
        return KERNELS[name]

    return make


@pytest.fixture
def fake_gpu(monkeypatch, fake):
    """A machine with a CUDA device and all libraries, as far as the choice can tell. Returns the list of probes."""
    for name in GPU_KERNELS:
        fake(name)
    probes = []

    def on_cpu(kernel, *, device, **case):
        probes.append(next(name for name, k in KERNELS.items() if k is kernel))
        return disagreement(kernel, device=CPU, **case)

    monkeypatch.setattr(choice, "disagreement", on_cpu)
    return probes


def check_kernel(kernel, *, dtype, d_qk, d_v, group, causal, device=CPU, rows=150, keys=(70, 130)):
    """Out, lse and every gradient of one softmax over two blocks of keys, against autograd of the explicit one.

    Causal: one square block alone. The kernel sees each block by itself and gets the merged out and lse for the
    backward, as on the bisected path.
    """
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=gen).to(device, dtype)

    keys = (rows,) if causal else keys
    D, E = kernel.widths(d_qk, d_v)
    scale = 0.1
    q, dout = normal(3, 2 * group, rows, d_qk), normal(3, 2 * group, rows, d_v)
    blocks = [(normal(3, 2, n, d_qk), normal(3, 2, n, d_v)) for n in keys]
    parts = [kernel.forward(pad_to(q, D), pad_to(k, D), pad_to(v, E), causal=causal, scale=scale) for k, v in blocks]
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    out = sum(part[0][..., :d_v].double() * (part[1] - lse).double().exp()[..., None] for part in parts)
    saved = pad_to(out.to(dtype), E)
    grads = [
        kernel.backward(
            pad_to(dout, E), pad_to(q, D), pad_to(k, D), pad_to(v, E), saved, lse, causal=causal, scale=scale
        )
        for k, v in blocks
    ]
    exact = [x.double().requires_grad_() for x in (q, *(torch.cat(x, 2) for x in zip(*blocks, strict=True)))]
    true_out, true_lse = explicit_forward(*exact, causal=causal, scale=scale)
    wanted = torch.autograd.grad(true_out, exact, dout.double())
    true_out, true_lse = true_out.detach(), true_lse.detach()
    dk, dv = (torch.cat([g[i][..., :w].double() for g in grads], 2) for i, w in ((1, d_qk), (2, d_v)))
    got = {"out": out, "lse": lse, "dq": sum(g[0][..., :d_qk].double() for g in grads), "dk": dk, "dv": dv}
    for name, true in zip(got, (true_out, true_lse, *wanted), strict=True):
        error = float((got[name].double() - true).abs().max() / true.abs().max())
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("d_qk", "d_v"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["products", "cpu_flash"])
def test_cpu_kernels(name, dtype, d_qk, d_v, group, causal):
    case = {"dtype": dtype, "d_qk": d_qk, "d_v": d_v, "group": group, "causal": causal}
    check_kernel(KERNELS[name], **case)
    assert disagreement(KERNELS[name], device=CPU, **case) is None


FAKES = [("sdpa_flash", {}), ("sdpa_cudnn", {"cudnn_lse_dims": 4}), ("sdpa_cudnn", {"cudnn_lse_dims": 3})]
FAKES += [("sdpa_efficient", {}), ("flash_attn_4", {})]
FAKES += [("flash_attn_2", {"version": version}) for version in ("2.5", "2.6", "2.8")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d_qk", "d_v", "group"), [(96, 64, 3), (40, 64, 1), (64, 64, 2)])
@pytest.mark.parametrize(("name", "options"), FAKES)
def test_adapters_of_gpu_kernels(fake, name, options, d_qk, d_v, group, causal):
    kernel = fake(name, **options)
    case = {"dtype": torch.float16, "d_qk": d_qk, "d_v": d_v, "group": group, "causal": causal}
    check_kernel(kernel, **case)
    assert disagreement(kernel, device=CPU, **case) is None


def _wrong(what):
    def forward(q, k, v, *, causal, scale):
        if what == "group":  # query head i reads kv head i mod h_kv
            k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
        out, lse = explicit_forward(
            q, k, v, causal=causal and what != "causal", scale=1.0 if what == "scale" else scale
        )
        return out.to(q.dtype), (lse * 1.4427 if what == "base 2" else lse).float()

    def backward(dout, q, k, v, out, lse, *, causal, scale):
        if what in ("own lse", "own out"):
            own_out, own_lse = explicit_forward(q, k, v, causal=causal, scale=scale)
            out, lse = (out, torch.where(lse > 1e29, lse, own_lse)) if what == "own lse" else (own_out, lse)
        if what == "excluded":
            lse = lse.clamp(max=10.0)
        dq, dk, dv = explicit_backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
        if what == "tail":
            dk[:, :, 192:] = 0
        if what == "nan":
            dq[:, :, -1, -1] = float("nan")
        return dq, dk, dv

    return Kernel(forward, backward, FLOATS, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "what", ["scale", "base 2", "causal", "group", "own lse", "own out", "excluded", "tail", "nan"]
)
def test_the_probe_refuses_a_wrong_kernel(what, dtype):
    case = {"device": CPU, "dtype": dtype, "d_qk": 96, "d_v": 64, "group": 2, "causal": True}
    assert disagreement(_wrong("nothing"), **case) is None
    said = "rows that take no part get a gradient" if what == "excluded" else "differs from plain products"
    assert said in disagreement(_wrong(what), **case)


def test_the_probe_answers_with_the_kernels_own_words_and_draws_nothing_from_the_global_generator():
    def broken(*_, **__):
        raise AssertionError("head dim 96 is\n   not supported")

    case = {"device": CPU, "dtype": torch.float32, "d_qk": 96, "d_v": 64, "group": 1, "causal": False}
    state = torch.get_rng_state()
    assert disagreement(Kernel(broken, broken, FLOATS, "cpu"), **case) == "AssertionError: head dim 96 is not supported"
    assert disagreement(KERNELS["cpu_flash"], **case) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_takes_the_first_that_agrees_and_probes_each_once(fake_gpu, monkeypatch, caplog):
    case = Case(CUDA, torch.float16, 96, 64, 1, False)
    with caplog.at_level("INFO"):
        assert choose(case, "auto") == choose(case, "auto") == "flash_attn_4"
    assert fake_gpu == ["flash_attn_4"] and "flash_attn_4" in caplog.text
    wrong = KERNELS["flash_attn_4"]._replace(forward=_wrong("base 2").forward)
    monkeypatch.setitem(KERNELS, "flash_attn_4", wrong)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    other = case._replace(causal=True)
    with caplog.at_level("INFO"):
        assert choose(other, "auto") == "sdpa_flash"
    assert (
        "not flash_attn_4: lse differs" in caplog.text and "not flash_attn_2: flash-attn is not usable" in caplog.text
    )
    assert choose(other._replace(dtype=torch.float32), "auto") == "sdpa_efficient"
    assert choose(other._replace(dtype=torch.float64), "auto") == "products"
    assert choose(other._replace(d_qk=320), "auto") == "sdpa_efficient"


def test_without_any_gpu_library_auto_is_left_with_products():
    case = Case(CUDA, torch.float16, 96, 64, 1, False)  # no CUDA device here: every probe raises
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, whose kernels work")
    assert choose(case, "auto") == "products"
    with pytest.raises(UserError, match="sdpa_flash cannot serve rectangles, float16, d_qk 96, d_v 64"):
        choose(case, "sdpa_flash")


def test_a_named_backend_serves_or_is_refused_in_one_line(fake_gpu, monkeypatch):
    case = Case(CUDA, torch.float16, 96, 64, 1, False)
    assert [choose(case, name) for name in GPU_KERNELS] == list(GPU_KERNELS)
    for module, name, install_line in (
        (packages.TWO, "flash_attn_2", "pip install --no-build-isolation flash-attn"),
        (packages.FOUR, "flash_attn_4", "pip install --pre flash-attn-4"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        packages._missing.cache_clear()
        with pytest.raises(UserError, match=install_line) as caught:
            choose(case._replace(causal=True), name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"has no float64 kernel.*set attention.backend to auto"):
        choose(case._replace(dtype=torch.float64), "sdpa_cudnn")
    with pytest.raises(UserError, match="takes heads up to 256 channels, not 320"):
        choose(case._replace(d_qk=320), "sdpa_flash")


def test_names_are_the_configs_and_belong_to_devices():
    assert typing.get_args(AttentionConfig.model_fields["backend"].annotation) == NAMES
    for name in ("auto", "cpu_flash", "products"):
        check_name(name, CPU)
    for name in GPU_KERNELS:
        check_name(name, CUDA)
        with pytest.raises(UserError, match=f"{name} runs on cuda only: on cpu set auto or cpu_flash or products"):
            check_name(name, CPU)
    with pytest.raises(UserError, match="'flash' is unknown: set one of auto, sdpa_flash"):
        check_name("flash", CPU)


def test_explain_on_a_gpu(fake_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, packages.FOUR, None)
    found = explain_backends(CUDA, torch.bfloat16, d_qk=96, d_v=64, group=2)
    assert [v.name for v in found][:3] == ["flash_attn_4", "flash_attn_2", "sdpa_flash"]
    assert [v.name for v in found if v.chosen] == ["flash_attn_2"]
    reasons = {v.name: v.reason for v in found}
    assert "pip install --pre flash-attn-4" in reasons["flash_attn_4"]
    assert reasons["sdpa_flash"] == "usable, but not the first" and reasons["cpu_flash"] == "runs on cpu only"
    named = explain_backends(CUDA, torch.bfloat16, d_qk=96, d_v=64, backend="sdpa_efficient")
    assert [v.name for v in named if v.chosen] == ["sdpa_efficient"]
    refused = explain_backends(CUDA, torch.bfloat16, d_qk=96, d_v=64, backend="flash_attn_4")
    assert not any(v.chosen for v in refused)


def test_explain_on_cpu():
    found = {v.name: v for v in explain_backends("cpu", torch.float32, d_qk=96, d_v=64)}
    assert {n for n, v in found.items() if v.chosen} == {"cpu_flash", "products"}
    assert found["products"].reason == "rectangles of at most 512 keys (backward: at most 512)"
    assert found["sdpa_flash"].reason == "runs on cuda only"
    found = explain_backends("cpu", torch.float32, d_qk=64, d_v=64, causal=True)
    assert [v.name for v in found if v.chosen] == ["cpu_flash"]
    with pytest.raises(UserError, match="unknown"):
        explain_backends("cpu", torch.float32, d_qk=64, d_v=64, backend="flash")
