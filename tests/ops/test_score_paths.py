"""Every path is the same function: the explicit T×T score in fp64 decides, in value and in every gradient."""

import pytest
import torch
from ops_cases import as_fp64, assert_close, cut, make, value_and_gradients

from sisa_dist.config import UserError
from sisa_dist.ops import causal_attention, sisa_attention

# fp64: 1e-12 of rounding log α to 2^-42 nats, ten times that at the worst shape; nothing else is above 1e-14.
FP64 = 1e-10
# fp32: measured 0.4e-6 to 2e-6 at every length; the factor is for other machines' orders of summation.
FP32 = 1e-5
# bf16: eight bits of mantissa; log α and θ sum the rounding of every product that follows a token.
BF16 = {"out": 1e-2, "log_alpha": 4e-2, "theta": 4e-2, "lam": 2e-2, "rest": 2e-2}


@pytest.mark.parametrize("decay", [0.03, 2.0])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 17, 63, 64, 65, 127, 129, 255, 257, 777, 1000, 1024])
def test_bisected_is_the_explicit_score(T, decay):
    x = make(T, batch=1 if T > 200 else 2, decay=decay)
    assert_close(value_and_gradients(x, path="bisected"), value_and_gradients(x, path="dense"), FP64)


@pytest.mark.parametrize("leaf", [1, 2, 7, 16, 100, 1000])
@pytest.mark.parametrize("T", [1, 7, 65, 131])
def test_any_leaf_is_the_same_function(T, leaf):
    x = make(T, heads=4, kv_heads=2, decay=0.5)
    assert_close(value_and_gradients(x, path="bisected", leaf=leaf), value_and_gradients(x, path="dense"), FP64)


@pytest.mark.parametrize("d_s", [0, 2, 16, 32, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "d_h", "d_v"), [(2, 2, 16, 16), (4, 2, 8, 24), (3, 1, 24, 8)])
def test_widths_and_grouped_heads(d_s, heads, kv_heads, d_h, d_v):
    x = make(150, heads=heads, kv_heads=kv_heads, d_h=d_h, d_v=d_v, d_s=d_s, decay=1.0, size=0.3)
    assert_close(value_and_gradients(x, path="bisected", leaf=32), value_and_gradients(x, path="dense"), FP64)


@pytest.mark.parametrize(("heads", "kv_heads", "d_v", "d_s"), [(2, 2, 8, 4), (4, 1, 24, 6), (2, 1, 8, 0)])
def test_single_is_the_explicit_score_where_it_is_finite(heads, kv_heads, d_v, d_s):
    x = make(130, heads=heads, kv_heads=kv_heads, d_v=d_v, d_s=d_s)
    assert_close(value_and_gradients(x, path="single"), value_and_gradients(x, path="dense"), FP64)


@pytest.mark.parametrize(("T", "decay"), [(5, 0.5), (300, 0.03), (777, 2.0), (1500, 1.6), (2048, 0.01)])
def test_fp32(T, decay):
    x = make(T, batch=1, d_h=64, d_s=32, decay=decay, dtype=torch.float32)
    assert_close(value_and_gradients(x), value_and_gradients(as_fp64(x), path="dense"), FP32, floor=0.2)


@pytest.mark.parametrize("decay", [pytest.param(0.01, marks=pytest.mark.slow), 2.0])
def test_fp32_at_4096(decay):
    x = make(4096, batch=1, heads=1, d_h=64, d_s=32, decay=decay, dtype=torch.float32)
    assert_close(value_and_gradients(x), value_and_gradients(as_fp64(x), path="dense"), FP32, floor=0.2)


@pytest.mark.parametrize("aux", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "decay"), [(65, 0.5), (777, 2.0), pytest.param(2048, 0.03, marks=pytest.mark.slow)])
def test_bf16(T, decay, aux):
    x = make(T, batch=1, heads=4, kv_heads=2, d_h=64, d_s=32, decay=decay, dtype=torch.bfloat16, aux=aux)
    got = value_and_gradients(x, path="auto")
    assert all(got[n].dtype == x[n].dtype for n in x) and got["out"].dtype == torch.bfloat16
    assert_close(got, value_and_gradients(as_fp64(x), path="dense"), BF16)


def test_fp16_forward_and_backward_stay_finite_and_right():
    x = make(777, batch=1, d_h=64, d_s=32, decay=2.0, dtype=torch.float16, aux=torch.float32)
    assert_close(value_and_gradients(x, path="auto"), value_and_gradients(as_fp64(x), path="dense"), BF16)


@pytest.mark.parametrize("path", ["auto", "single", "bisected", "dense"])
def test_without_lambda_it_is_plain_attention(path):
    x = make(200, heads=4, kv_heads=2, decay=0.1)
    x["lam"] = torch.zeros_like(x["lam"]).requires_grad_()
    got = value_and_gradients(x, path=path)
    wanted = value_and_gradients({n: x[n] for n in "qkv"}, causal_attention)
    assert_close({n: got[n] for n in wanted}, wanted, FP64)
    assert all((got[n] == 0).all() for n in ("C", "B", "log_alpha", "theta"))
    assert got["lam"].abs().min() > 1e-4  # λ = 0 must still be able to learn


@pytest.mark.parametrize("path", ["auto", "single", "bisected", "dense"])
def test_without_decay_and_phase_the_score_is_bilinear(path):
    x = make(150, decay=0.0, theta=0.0)

    def bilinear(q, k, v, C, B, lam):
        score = q @ k.mT / q.shape[-1] ** 0.5 + lam[:, None, None] * (C @ B.mT)
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
        return score.masked_fill(hidden, float("-inf")).softmax(-1) @ v

    wanted = value_and_gradients({n: z for n, z in x.items() if n not in ("log_alpha", "theta")}, bilinear)
    got = value_and_gradients(x, path=path)
    assert_close({n: got[n] for n in wanted}, wanted, FP64)


def test_rotation_is_over_adjacent_pairs_and_differences_only():
    """Written out for one head and two tokens: s_10 = q·k·scale + λ e^{log α_1} C_1ᵀ R(−θ_1) B_0."""
    x = make(2, batch=1, heads=1, d_s=4)
    with torch.no_grad():
        q, k, v, C, B = (x[n][0, 0] for n in "qkvCB")
        turned = []
        for pair, angle in enumerate(-x["theta"][0, 0, 1]):
            turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
            turned.append(turn @ B[0, 2 * pair : 2 * pair + 2])
        far = q[1] @ k[0] / 8**0.5 + x["lam"] * x["log_alpha"][0, 0, 1].exp() * (C[1] @ torch.cat(turned))
        near = q[1] @ k[1] / 8**0.5 + x["lam"] * (C[1] @ B[1])
        wanted = torch.cat((far, near)).softmax(0) @ v
        for path in ("dense", "single", "bisected"):
            out = sisa_attention(**x, path=path, leaf=1)
            assert torch.allclose(out[0, 0, 1], wanted, atol=1e-12)
            assert torch.allclose(out[0, 0, 0], v[0], atol=1e-12)


@pytest.mark.parametrize("decay", [0.03, 1.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["bisected", "dense"])
def test_later_tokens_never_move_earlier_outputs(path, dtype, decay):
    """Bit for bit, and no gradient flows to them: not a token is used before its time, in any product."""
    T = 300
    aux = torch.float32 if dtype == torch.bfloat16 else dtype
    x, other = (make(T, heads=4, kv_heads=2, decay=decay, dtype=dtype, aux=aux, seed=s) for s in (0, 1))
    for t in (0, 1, 63, 64, 100, 191, 255, 298):
        mixed = {
            n: (z if n == "lam" else torch.cat((z[:, :, : t + 1], other[n][:, :, t + 1 :]), 2)) for n, z in x.items()
        }
        out, out_mixed = (sisa_attention(**y, path=path) for y in (x, mixed))
        assert torch.equal(out[:, :, : t + 1], out_mixed[:, :, : t + 1])
    names = [n for n in x if n != "lam"]
    for n, grad in zip(names, torch.autograd.grad(out[:, :, :100].sum(), [x[n] for n in names]), strict=True):
        assert (grad[:, :, 100:] == 0).all(), n


def test_a_prefix_is_the_full_run():
    x = make(400, decay=0.5)
    full = sisa_attention(**x)
    for t in (1, 64, 200, 333):
        assert torch.allclose(sisa_attention(**cut(x, 0, t)), full[:, :, :t], atol=1e-11)


def test_auto_is_right_where_one_reference_overflows():
    """Large C and B on top of strong decay: the one call is not finite, auto is exact without having looked."""
    x = make(400, batch=1, d_h=16, d_s=16, decay=2.0, size=12.0, dtype=torch.float32)
    assert not sisa_attention(**x, path="single").isfinite().all()
    wanted = value_and_gradients(as_fp64(x), path="dense")
    assert_close(value_and_gradients(x, path="auto"), wanted, 1e-3)  # scores of ±1e3: fp32 knows them to 1e-4 only


@pytest.mark.parametrize("decay", [50.0, 200.0])
def test_any_decay_is_finite_and_exact(decay):
    x = make(300, decay=decay, dtype=torch.float32)
    assert_close(value_and_gradients(x), value_and_gradients(as_fp64(x), path="dense"), FP32)


@pytest.mark.parametrize("T", [64, 4000])
def test_auto_inside_its_declared_bound_is_safe_up_to_the_edge(T):
    """T·|log_alpha_min| = 40 exactly, every token at the bound, and C, B as large as still means something."""
    x = make(T, batch=1, heads=1, d_h=16, d_s=16, dtype=torch.float32, size=30.0)
    x["log_alpha"] = torch.full_like(x["log_alpha"], -40.0 / T).requires_grad_()
    got = value_and_gradients(x, log_alpha_min=-40.0 / T)
    assert all(g.isfinite().all() for g in got.values())
    # Scores reach 1e4, which fp32 holds to 1e-3.
    assert (got["out"] - sisa_attention(**as_fp64(x), path="dense")).abs().max() < 2e-2


def test_auto_keeps_half_precision_off_the_one_call_where_it_would_overflow():
    x = make(400, decay=0.1, dtype=torch.float16, aux=torch.float32)
    x["log_alpha"] = torch.full_like(x["log_alpha"], -0.1).requires_grad_()
    got = value_and_gradients(x, log_alpha_min=-0.1)
    assert all(g.isfinite().all() for g in got.values())
    assert (got["out"].double() - sisa_attention(**as_fp64(x), path="dense")).abs().max() < 5e-3
    assert not sisa_attention(**x, path="single").isfinite().all()  # what auto must not choose


def test_auto_chooses_from_shapes_and_the_bound_alone():
    """On the meta device there are no values to read; the profiler of ops says which path ran."""

    def ran(T, **kwargs):
        x = {n: z.detach().to("meta") for n, z in make(T).items()}
        doc_ids = torch.zeros(2, T, dtype=torch.long, device="meta") if kwargs.pop("docs", False) else None
        with _OpNames() as seen:
            assert sisa_attention(**x, doc_ids=doc_ids, **kwargs).shape == (2, 2, T, 8)
        return "bisected" if "sisa_dist::bisected" in seen.names else "single"

    assert ran(400, log_alpha_min=-0.1) == "single"
    assert ran(401, log_alpha_min=-0.1) == "bisected"
    assert ran(400, log_alpha_min=-0.1, docs=True) == "bisected"
    assert ran(4) == "bisected"


class _OpNames(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["auto", "single", "dense"])
def test_autocast_changes_nothing(path):
    x = make(100, dtype=torch.float32)
    plain = sisa_attention(**x, path=path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = sisa_attention(**x, path=path)
    assert torch.equal(plain, under)
    for a, b in zip(*(torch.autograd.grad(y.sum(), list(x.values())) for y in (plain, under)), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs_as_a_model_gives_them():
    x = make(130, heads=4, kv_heads=2, d_s=6)
    strided = {
        n: z.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() if z.ndim > 1 else z
        for n, z in x.items()
    }
    assert_close(value_and_gradients(strided), value_and_gradients(x), 1e-14)


def test_scale_is_free():
    x = make(100)
    got, wanted = (value_and_gradients(x, path=p, scale=0.7) for p in ("bisected", "dense"))
    assert_close(got, wanted, FP64)
    assert_close(value_and_gradients(x, path="single", scale=0.7), wanted, FP64)
    assert (wanted["out"] - sisa_attention(**x, path="dense")).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "kwargs", "word"),
    [
        ({}, {"path": "fast"}, "path"),
        ({}, {"leaf": 0}, "leaf"),
        ({}, {"scale": 0.0}, "scale"),
        ({}, {"log_alpha_min": 0.1}, "log_alpha_min"),
        ({}, {"doc_ids": torch.zeros(2, 9, dtype=torch.long)}, "doc_ids"),
        ({}, {"doc_ids": torch.zeros(2, 10)}, "doc_ids"),
        ({"k": torch.zeros(2, 3, 10, 8)}, {}, "kv heads"),
        ({"v": torch.zeros(2, 2, 9, 8)}, {}, "v"),
        ({"C": torch.zeros(2, 2, 10, 5)}, {}, "d_s"),
        ({"theta": torch.zeros(2, 2, 10, 4)}, {}, "theta"),
        ({"lam": torch.zeros(3)}, {}, "lam"),
        ({"k": torch.zeros(2, 2, 10, 8, dtype=torch.bfloat16)}, {}, "dtype"),
        ({"q": torch.zeros(2, 2, 8)}, {}, "4-D"),
        ({"log_alpha": torch.zeros(2, 2, 10, dtype=torch.long)}, {}, "log_alpha"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, kwargs, word):
    x = make(10, dtype=torch.float32)
    with pytest.raises(UserError, match=word) as caught:
        sisa_attention(**{**x, **change}, **kwargs)
    assert "\n" not in str(caught.value)
