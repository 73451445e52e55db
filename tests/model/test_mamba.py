"""The Mambas against step recurrences written out from their equations, in fp64, with every gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixer_cases import BASE, RIVALS
from sisa_dist.config import ModelConfig, UserError
from sisa_dist.model import build_model
from sisa_dist.model.mixers.mamba import Mamba
from sisa_dist.model.mixers.mamba2 import Mamba2
from sisa_dist.model.mixers.mamba3 import Mamba3, Rates3
from sisa_dist.model.rope import rope_tables
from sisa_dist.parallel.plan import check_tp

ROPE = rope_tables(0, 1, channels=2, theta=1e4, device=torch.device("cpu"))
P, N = 16, 12


def mixer_of(name: str, **changes: Any) -> Any:
    """One mixer in fp64, no two of its numbers alike."""
    model = build_model(ModelConfig(**(BASE | RIVALS[name] | {"n_layers": 1} | changes)), seed=3).double()
    mixer, generator = model.blocks[0].mixer, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mixer


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normed(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def mamba2_steps(mixer: Mamba2, u_TD: Tensor, groups: int) -> Tensor:
    """One sequence, token by token, heads in a loop."""
    p = dict(mixer.named_parameters())
    A, D = -p["rates.A_log"].exp(), p["skip.D"]
    heads = len(A)
    h = [u_TD.new_zeros(N, P)] * heads
    rows = []
    for t in range(len(u_TD)):

        def convolved(kind: str, t: int = t) -> Tensor:
            taps, total = p[f"conv_{kind}.weight"], p[f"conv_{kind}.bias"]
            for back in range(min(taps.shape[1], t + 1)):
                total = total + taps[:, -1 - back] * (p[f"w{kind}.weight"] @ u_TD[t - back])
            return silu(total)

        x, B, C = convolved("x").view(heads, P), convolved("B").view(groups, N), convolved("C").view(groups, N)
        delta = torch.log1p(torch.exp(p["wdt.weight"] @ u_TD[t] + p["rates.dt_bias"]))
        y = []
        for i in range(heads):
            group = i // (heads // groups)
            h[i] = torch.exp(delta[i] * A[i]) * h[i] + delta[i] * torch.outer(B[group], x[i])
            y.append(C[group] @ h[i] + D[i] * x[i])
        gated = torch.cat(y) * silu(p["wz.weight"] @ u_TD[t])
        rows.append(p["wout.weight"] @ (normed(gated.view(groups, -1), 1e-6).flatten() * p["gated_norm.weight"]))
    return torch.stack(rows)


def mamba_steps(mixer: Mamba, u_TD: Tensor, norms: bool) -> Tensor:
    """One sequence, token by token."""
    p = dict(mixer.named_parameters())
    channels, rank, states = len(p["skip.D"]), p["wdt.weight"].shape[1], p["wselect.weight"].shape[0]
    states = (states - rank) // 2
    A, h, rows = -p["rates.A_log"].view(channels, states).exp(), u_TD.new_zeros(channels, states), []
    taps = p["conv_x.weight"]
    for t in range(len(u_TD)):
        x = p["conv_x.bias"]
        for back in range(min(taps.shape[1], t + 1)):
            x = x + taps[:, -1 - back] * (p["wx.weight"] @ u_TD[t - back])
        x = silu(x)
        dt, B, C = (p["wselect.weight"] @ x).split([rank, states, states])
        if norms:
            dt, B, C = (normed(z, 1e-6) * p[f"{kind}_norm.weight"] for z, kind in ((dt, "dt"), (B, "B"), (C, "C")))
        delta = torch.log1p(torch.exp(p["wdt.weight"] @ dt + p["rates.dt_bias"]))
        h = torch.exp(delta[:, None] * A) * h + torch.outer(delta * x, B)
        rows.append(p["wout.weight"] @ ((h @ C + p["skip.D"] * x) * silu(p["wz.weight"] @ u_TD[t])))
    return torch.stack(rows)


def mamba3_steps(mixer: Mamba3, u_TD: Tensor, groups: int, rank: int, form: str) -> Tensor:
    """One sequence, token by token, heads in a loop; the state turns with complex numbers."""
    p = dict(mixer.named_parameters())
    heads, S = len(p["skip.D"]), N // 4
    h, last = [u_TD.new_zeros(N, P)] * heads, None
    phase = u_TD.new_zeros(heads, S)
    bias = {kind: p[f"{kind}_bias.bias"].view(heads, rank, N) for kind in "BC"}
    ones = u_TD.new_ones(heads, 1, P)
    m = {key: p[f"mimo.{key}"] if rank > 1 else ones for key in ("x", "z", "out")}
    rows = []
    for u in u_TD:
        delta = torch.log1p(torch.exp(p["wdt.weight"] @ u + p["rates.dt_bias"]))
        raw = p["wA.weight"] @ u
        if form == "softplus":
            A = -torch.log1p(torch.exp(raw))
        else:
            A = -torch.stack([1 + value if value >= 0 else 1 / (1 - value) for value in raw])
        A = torch.minimum(A, torch.tensor(-1e-4, dtype=A.dtype))
        lam = 1 / (1 + torch.exp(-(p["wtrap.weight"] @ u)))
        phase = phase + math.pi * torch.tanh(p["wangle.weight"] @ u) * delta[:, None]
        x, z = (p["wx.weight"] @ u).view(heads, P), (p["wz.weight"] @ u).view(heads, P)

        def projected(kind: str, i: int, u: Tensor = u, phase: Tensor = phase) -> Tensor:
            rows = (p[f"w{kind}.weight"] @ u).view(groups, rank, N)[i // (heads // groups)]
            rows = normed(rows, 1e-5) * p[f"{kind}_norm.weight"] + bias[kind][i]
            pairs = torch.view_as_complex(rows[:, : 2 * S].reshape(rank, S, 2)) * torch.exp(1j * phase[i])
            return torch.cat((torch.view_as_real(pairs).flatten(1), rows[:, 2 * S :]), 1)

        now, y = [], []
        for i in range(heads):
            B, xs = projected("B", i), x[i] * m["x"][i]
            alpha = torch.exp(delta[i] * A[i])
            state = alpha * h[i] + lam[i] * delta[i] * B.T @ xs
            if last is not None:
                state = state + (1 - lam[i]) * delta[i] * alpha * last[i][0].T @ last[i][1]
            h[i] = state
            now.append((B, xs))
            out = projected("C", i) @ state + p["skip.D"][i] * xs
            y.append((out * silu(z[i] * m["z"][i]) * m["out"][i]).sum(0))
        last = now
        rows.append(p["wout.weight"] @ torch.cat(y))
    return torch.stack(rows)


def same_with_gradients(mixer: Any, got: Tensor, want: Tensor, u: Tensor) -> None:
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    leaves = {"u": u, **dict(mixer.named_parameters())}
    found = [torch.autograd.grad((y * direction).sum(), list(leaves.values())) for y in (got, want)]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * want.abs().max().item())
    for name, a, b in zip(leaves, *found, strict=True):
        assert b.abs().max() > 0, name
        assert (a - b).abs().max() < 1e-10 * b.abs().max(), name


def inputs(T: int = 37) -> Tensor:
    return torch.randn(1, T, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


LENGTHS = [1, 13, 23]  # of documents
DOC_IDS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_mamba_is_its_recurrence(name: str) -> None:
    mixer, u, norms = mixer_of(name, mixer="mamba"), inputs(), name == "jamba"
    same_with_gradients(mixer, mixer(u, ROPE)[0], mamba_steps(mixer, u[0], norms), u)
    apart = torch.cat([mamba_steps(mixer, part, norms) for part in u[0].split(LENGTHS)])
    same_with_gradients(mixer, mixer(u, ROPE, DOC_IDS)[0], apart, u)


@pytest.mark.parametrize("name", ["mamba2", "mamba2_groups"])
def test_mamba2_is_its_recurrence(name: str) -> None:
    mixer, u, groups = mixer_of(name), inputs(), 2 if "groups" in name else 1
    same_with_gradients(mixer, mixer(u, ROPE)[0], mamba2_steps(mixer, u[0], groups), u)
    apart = torch.cat([mamba2_steps(mixer, part, groups) for part in u[0].split(LENGTHS)])
    same_with_gradients(mixer, mixer(u, ROPE, DOC_IDS)[0], apart, u)


@pytest.mark.parametrize("form", ["softplus", "rational"])
@pytest.mark.parametrize(("groups", "rank"), [(1, 1), (2, 1), (2, 3)])
def test_mamba3_is_its_recurrence(form: str, groups: int, rank: int) -> None:
    ssm = RIVALS["mamba3"]["ssm"] | {"n_groups": groups}
    mixer, u = mixer_of("mamba3", ssm=ssm, mamba3={"rank": rank, "decay": form}), inputs()
    same_with_gradients(mixer, mixer(u, ROPE)[0], mamba3_steps(mixer, u[0], groups, rank, form), u)
    apart = torch.cat([mamba3_steps(mixer, part, groups, rank, form) for part in u[0].split(LENGTHS)])
    same_with_gradients(mixer, mixer(u, ROPE, DOC_IDS)[0], apart, u)


def test_chunks_change_speed_and_never_the_result() -> None:
    for name in ("mamba2", "mamba3", "mamba3_mimo"):
        found = [mixer_of(name, ssm=RIVALS[name]["ssm"] | {"chunk": chunk})(inputs(), ROPE) for chunk in (1, 5, 64)]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["softplus", "rational"])
def test_the_decay_of_mamba3_has_a_floor_and_finite_slopes(form: Any) -> None:
    rates = Rates3(1, form).double()
    rates.dt_bias.data.zero_()
    u = torch.tensor([-1e6, -3.0, -1e-3, 0.0, 1e-3, 1.0, 5.0], dtype=torch.float64).requires_grad_()
    zero = torch.zeros_like(u)[None, :, None]
    delta, log_decay, _ = rates(zero, u[None, :, None], zero)
    f = -log_decay / delta
    want = F.softplus(u) if form == "softplus" else torch.where(u >= 0, 1 + u, 1 / (1 - u))
    torch.testing.assert_close(f[0, 0], want.clamp(min=1e-4), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(f.sum(), u)
    assert slope.isfinite().all() and slope[0] == 0 and (slope[1:] > 0).all()
    if form == "rational":
        assert slope[3] == 1 and abs(slope[2].item() - 1) < 3e-3, "one slope from both sides of 0"


def test_turns_and_decays_past_all_digits_leave_the_others_exact() -> None:
    """A token of 1e5 radians and 1e4 nats: an fp32 running sum would leave later phases wrong by 1e-2."""
    mixer, u = mixer_of("mamba3"), inputs()
    with torch.no_grad():
        mixer.wdt.weight.zero_()
        mixer.wdt.weight[:, 0] = 1.0
        u[0, :, 0], u[0, 9, 0] = 0.1, 4e4  # Δ of a token of its own
        u32 = u.float()
        exact, rough = mixer(u32.double(), ROPE), mixer.float()(u32, ROPE)
    assert (rough[0, 10:] - exact[0, 10:]).abs().max() < 1e-5 * exact[0, 10:].abs().max()


def test_initial_values_are_the_papers() -> None:
    ssm = {"head_dim": 4, "d_state": 8}
    model = build_model(ModelConfig(**(BASE | {"mixer": ["mamba2", "mamba3"], "ssm": ssm, "mamba3": {"rank": 2}})))
    two, three = (block.mixer for block in model.blocks)
    for mixer in (two, three):
        delta = F.softplus(mixer.rates.dt_bias)
        assert 1e-3 <= delta.min() < 5e-3 and 2e-2 < delta.max() <= 0.1 and len(delta.unique()) == 16
        assert (mixer.skip.D == 1).all()
    torch.testing.assert_close(two.rates.A_log.exp(), torch.arange(1.0, 17.0))
    assert two.conv_x.weight.abs().max() <= 0.5 and abs(two.conv_x.weight.std() - 0.5 / 3**0.5) < 0.03
    assert (two.conv_x.bias == 0).all() and (two.gated_norm.weight == 1).all()
    assert (three.B_bias.bias == 1).all() and (three.C_bias.bias == 1).all()
    assert (three.mimo.x == 0.5).all() and (three.mimo.z == 1).all() and (three.mimo.out == 0.5).all()


def test_slices_of_initial_values_are_the_whole() -> None:
    """What a rank draws of its own rows is what one process has there."""
    from sisa_dist.model.init import InverseSoftplus, LogIndex, Uniform

    for rule in (Uniform(0.5), InverseSoftplus(1e-3, 0.1), LogIndex()):
        whole = rule.draw(b"a key 12", 0, 70_000)
        assert np.array_equal(rule.draw(b"a key 12", 65_000, 66_000), whole[65_000:66_000])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mixer": "mamba2", "ssm": {"head_dim": 24}}, "64 channels are not a multiple of its head_dim 24"),
        ({"mixer": "mamba2", "ssm": {"head_dim": 16, "n_groups": 3}}, "ssm.n_groups 3 does not divide 4 heads"),
        ({"mixer": "mamba2", "ssm": {"conv": 0, "head_dim": 16}}, "ssm.conv is 0 and mamba2 has a convolution"),
        ({"mixer": "mamba", "ssm": {"conv": 0}}, "ssm.conv is 0 and mamba has a convolution"),
        ({"mixer": "mamba", "ssm": {"head_dim": 16}}, "ssm.head_dim is set and mamba has neither"),
        ({"mixer": "mamba", "ssm": {"n_groups": 2}}, "ssm.n_groups is set and mamba has neither"),
        ({"mixer": "mamba2", "mamba": {"norms": True}}, "mamba is set but"),
        ({"mixer": "mamba3", "ssm": {"d_state": 10, "head_dim": 16}}, "half of ssm.d_state 10 in pairs: set 12"),
        ({"mixer": "mamba3", "ssm": {"conv": 3, "head_dim": 16}}, "ssm.conv 3 .* no convolution"),
        ({"mixer": "mamba2", "mamba3": {"rank": 2}}, "mamba3 is set but"),
        ({"mixer": "attention", "ssm": {}}, "ssm is set but"),
        ({"mixer": "mamba2", "d_ff": 0, "ssm": {"head_dim": 16}}, "d_ff is missing and layers have an MLP"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig(**(BASE | changes))


@pytest.mark.parametrize(
    ("tp", "says"),
    [
        (8, r"does not divide the heads of ssm, 4: set parallel\.tp to one of \[1, 2, 4\], or model\.ssm\.head_dim"),
        (3, r"does not divide the heads of ssm, 4"),
    ],
)
def test_tp_that_does_not_divide_is_refused(tp: int, says: str) -> None:
    model = ModelConfig(**(BASE | {"n_heads": 1, "d_ff": 0, "vocab_multiple": 24} | RIVALS["mamba2"]))
    check_tp(model, 2)  # neither the one attention head nor the missing MLP is in the way
    with pytest.raises(UserError, match=says):
        check_tp(model, tp)


def test_groups_that_neither_divide_tp_nor_are_divided_are_refused() -> None:
    values = BASE | {"mixer": "mamba2", "mlp": "none", "vocab_multiple": 24, "ssm": {"head_dim": 2, "width": 48}}
    for groups, tp in ((3, 6), (6, 2), (3, 2)):
        values["ssm"] = values["ssm"] | {"n_groups": groups}
        model = ModelConfig(**values)
        if (groups, tp) == (3, 2):
            with pytest.raises(UserError, match=r"ssm\.n_groups 3.*divisor or a multiple"):
                check_tp(model, tp)
        else:
            check_tp(model, tp)
