"""What lies a million tokens in: Φ and g are as exact there as at the start, in training and in decoding.

A row of documents reaches it in training, since a single one's scores would be 5e11. In decoding the scores of the
prompt itself are left out, which nothing after it reads.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ops_cases import cut, make, value_and_gradients
from torch import Tensor

from sisa_dist.ops import SisaCache, sisa_attention
from sisa_dist.ops.phase import running_phase
from sisa_dist.ops.rotation import running_sum
from sisa_dist.ops.spans import phase_turns

MILLION = 1 << 20
TAU = np.longdouble("6.28318530717958647692528676655900577")
GEN = torch.Generator().manual_seed(0)
THETAS = {
    "small": 0.01 * torch.randn(MILLION, generator=GEN),
    "large": 3 * torch.randn(MILLION, generator=GEN),
    "drifting": 0.7 + 0.3 * torch.randn(MILLION, generator=GEN),
    "one_token_repeated": torch.full((MILLION,), 0.0123),
    "one_fast_token_repeated": torch.full((MILLION,), 31.25),
}


def error(phase: Tensor, theta: Tensor) -> float:
    """Largest error in radians, mod 2π, of the running sums, against extended precision."""
    difference = (phase.numpy().astype(np.longdouble) - theta.numpy().astype(np.longdouble).cumsum()) / TAU
    return float(np.abs(difference - np.round(difference)).max() * TAU)


@pytest.mark.parametrize("name", THETAS)
def test_phases_are_right_to_an_angles_own_rounding(name: str) -> None:
    theta = THETAS[name]
    assert np.finfo(np.longdouble).nmant > 60
    shaped = theta[None, None, :, None]
    turns = phase_turns(shaped, None, work=torch.float32)[0, 0, :, 0]
    assert turns.dtype == torch.float32
    assert error(turns.double() * (2 * math.pi), theta) < 3e-7  # training; half an fp32 ulp of π is 1.2e-7
    assert error(running_phase(shaped, None)[0, 0, :, 0].double(), theta) < 4e-7
    assert error(running_sum(theta, dim=0).remainder(2 * math.pi), theta) < 2e-9  # decoding, fp64
    # What this is measured against: the sum a model would take without care.
    assert name == "small" or error(theta.cumsum(0).remainder(2 * math.pi).double(), theta) > 1e-4


@pytest.mark.parametrize(
    ("path", "decay", "tokens"),
    [
        ("bisected", 0.03, MILLION // 8),
        *(
            pytest.param(path, decay, MILLION, marks=pytest.mark.slow)
            for path, decay in (("bisected", 0.03), ("bisected", 2.0), ("single", 0.03), ("single", 0.1))
        ),
    ],
)
def test_a_document_at_the_end_is_what_it_is_alone(path: str, decay: float, tokens: int) -> None:
    """Outputs and every gradient, in fp32, after thousands of documents; at 2 nats a token g passes a million."""
    length = 100
    x = make(tokens, batch=1, heads=1, d_h=4, d_s=2, decay=decay, dtype=torch.float32, theta=0.5)
    starts = torch.arange(tokens) % 64 == 0
    starts[-length:] = False
    starts[-length] = True
    ids = starts.cumsum(0)[None]
    got = value_and_gradients(x, lambda **y: last(sisa_attention(**y, doc_ids=ids, path=path), length))
    wanted = value_and_gradients(cut(x, tokens - length, tokens), sisa_attention, path=path)
    for name, reference in wanted.items():
        found = got[name] if name == "lam" else got[name][:, :, -length:]
        assert (found - reference).abs().max() <= 1e-5 * reference.abs().max(), name
        assert name in ("lam", "out") or not got[name][:, :, :-length].any(), name


def last(out: Tensor, length: int) -> Tensor:
    return out[:, :, -length:]


class Unscored(SisaCache):
    """Holds a prompt without computing what its own tokens see."""

    _whole = staticmethod(lambda q, *_, **__: torch.zeros_like(q))


def test_decoding_after_a_million_tokens_is_exact() -> None:
    """The next tokens' outputs against fp64 and extended precision over all keys, whose weights differ by e^{±30}."""
    x = {n: z.detach() for n, z in make(MILLION + 3, batch=1, heads=2, kv_heads=1, d_h=4, d_s=2, decay=1e-5).items()}
    x = {n: z.float() for n, z in x.items()} | {"C": 10 * x["C"].float()}
    cache, parts = Unscored(), []
    for start, stop in ((0, MILLION), (MILLION, MILLION + 1), (MILLION + 1, MILLION + 3)):
        parts.append(cache.attend(**{n: z.detach() for n, z in cut(x, start, stop).items()}))
    got = torch.cat(parts[1:], 2)
    wanted = torch.cat([explicit_row(x, i) for i in range(MILLION, MILLION + 3)], 2)
    assert (got - wanted).abs().max() < 2e-6


def explicit_row(x: dict[str, Tensor], i: int) -> Tensor:
    """Token i's output [1, H, 1, d], from the equations, Φ in extended precision."""
    theta = x["theta"][0, 0].numpy().astype(np.longdouble).cumsum(0)
    angle = torch.from_numpy(((theta[: i + 1] - theta[i]) % TAU).astype(np.float64))  # Φ_j − Φ_i
    g = x["log_alpha"][0, 0].double().cumsum(0)
    B = torch.view_as_complex(x["B"][0, 0, : i + 1].double().unflatten(-1, (-1, 2)))
    rows = []
    for h in range(2):
        C = torch.view_as_complex(x["C"][0, h, i].double().unflatten(-1, (-1, 2)))
        ssm = (C.conj() * torch.polar(torch.ones_like(angle), angle) * B).real.sum(-1)
        score = x["k"][0, 0, : i + 1].double() @ x["q"][0, h, i].double() / 2
        score = score + x["lam"][h].double() * (g[i] - g[: i + 1]).exp() * ssm
        rows.append(score.softmax(0) @ x["v"][0, 0, : i + 1].double())
    return torch.stack(rows)[None, :, None].float()
