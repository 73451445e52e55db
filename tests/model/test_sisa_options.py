"""SISA's controls and SSMax against their formulas, the paths they take, and what the config refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixer_cases import BASE
from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model import build_model
from sisa_dist.model.mixers import SISA, Attention
from sisa_dist.model.rope import apply_rope, rope_tables
from sisa_dist.ops import score

T = 37


def mixer_of(**changes: Any) -> Any:
    config = ModelConfig(**(BASE | {"n_layers": 1} | changes))
    mixer = build_model(config, attention=AttentionConfig(leaf=8)).double().blocks[0].mixer
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim < 2:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return mixer


def inputs() -> tuple[Tensor, Any, Tensor]:
    """x, the rotary tables, and ids of three documents."""
    x = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ids = torch.bucketize(torch.arange(T), torch.tensor([5, 21]), right=True).expand(2, T)
    return x, rope_tables(0, T, channels=8, theta=1e4, device=torch.device("cpu")), ids


def written_out(mixer: Any, x: Tensor, rope: Any, doc_ids: Tensor | None) -> Tensor:
    """The layer straight from its equations, a row of scores at a time."""

    def heads(w: Any, width: int) -> Tensor:
        return w(x).view(2, T, -1, width).transpose(1, 2)

    def wide(z: Tensor) -> Tensor:
        return z.repeat_interleave(4 // z.shape[1], 1)

    q, k, v = apply_rope(heads(mixer.wq, 8), rope), apply_rope(heads(mixer.wk, 8), rope), heads(mixer.wv, 8)
    importance = torch.zeros(2, 4, T, T, dtype=torch.float64)
    if isinstance(mixer, SISA):
        C, B = heads(mixer.wc, 8), wide(heads(mixer.wb, 8))
        if mixer.wtheta is not None:
            phase = wide(heads(mixer.wtheta, 4)).cumsum(2)
            turn = torch.polar(torch.ones_like(phase), phase)
            C, B = (
                torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (4, 2))) * turn).flatten(-2) for z in (C, B)
            )
        importance = C @ B.mT * mixer.importance()[:, None, None]
        if mixer.decay is not None:
            g = wide(mixer.decay(x)).cumsum(-1)
            importance = importance * (g[..., :, None] - g[..., None, :]).clamp(max=0).exp()
    s = q @ wide(k).mT / math.sqrt(8) + importance
    rows = []
    for i in range(T):
        first = 0 if doc_ids is None else int((doc_ids[0] < doc_ids[0, i]).sum())
        row = s[:, :, i, first : i + 1]
        if mixer.ssmax is not None:
            row = row * mixer.ssmax.scale[:, None] * math.log(i + 1 - first)
        rows.append((row.softmax(-1)[:, :, None] @ wide(v)[:, :, first : i + 1])[:, :, 0])
    return mixer.wo(torch.stack(rows, 2).transpose(1, 2).flatten(2))


OPTIONS: dict[str, dict[str, Any]] = {
    "sisa": {},
    "ssmax": {"ssmax": 64, "n_kv_heads": 2},
    "no_decay": {"sisa": {"decay": False}, "n_kv_heads": 2},
    "no_rotation": {"sisa": {"rotation": False}},
    "bilinear_ssmax": {"sisa": {"decay": False, "rotation": False}, "ssmax": 64},
    "attention_ssmax": {"mixer": "attention", "d_s": None, "ssmax": 64, "n_kv_heads": 1},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_formula_with_every_gradient(name: str, packed: bool) -> None:
    mixer = mixer_of(**({"mixer": "sisa", "d_s": 8} | OPTIONS[name]))
    x, rope, ids = inputs()
    doc_ids = ids if packed else None
    found = []
    for y in (mixer(x, rope, doc_ids), written_out(mixer, x, rope, doc_ids)):
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])))
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).abs().max() < 1e-10 * wanted.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize(
    ("decay", "packed", "path"),
    [(False, False, "single"), (False, True, "bisected"), (True, False, "bisected")],
)
def test_without_decay_one_call_is_taken_at_any_length(
    decay: bool, packed: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = mixer_of(mixer="sisa", d_s=8, sisa={"decay": decay})
    taken = []
    for name in ("single", "bisected"):
        real = getattr(score, f"sisa_{name}")
        monkeypatch.setattr(
            score, f"sisa_{name}", lambda *a, real=real, name=name, **k: taken.append(name) or real(*a, **k)
        )
    x, rope, ids = inputs()
    mixer(x, rope, ids if packed else None)
    assert taken == [path]


def test_ssmax_starts_where_scores_keep_their_size() -> None:
    (mean,) = {float(torch.arange(1, 65).double().log().mean())}
    mixer = build_model(ModelConfig(**(BASE | {"mixer": "attention", "ssmax": 64}))).blocks[0].mixer
    assert isinstance(mixer, Attention) and mixer.ssmax is not None
    assert torch.allclose(mixer.ssmax.scale, torch.full((4,), 1 / mean))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "attention", "sisa": {"decay": False}}, "sisa is set but no layer's mixer reads it: remove sisa"),
        ({"mixer": "fox", "ssmax": 64}, "ssmax is set but no layer's mixer reads it"),
        ({"mixer": "attention", "fox": {"pro": True}}, "fox is set but no layer's mixer reads it"),
        ({"mixer": "sisa", "d_s": 8, "sisa": {"decay": False}, "log_alpha_min": -1.0}, "remove one of them"),
        ({"mixer": "attention", "ssmax": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(BASE | changes))
