"""Samples of the score against the dense oracle: with v the identity its output is attention itself."""

from __future__ import annotations

import pytest
import torch
from ops_cases import make
from torch import Tensor

from sisa_dist.ops import sampled
from sisa_dist.ops.dense import sisa_dense
from sisa_dist.ops.sampled import sampled_scores

DOCS = torch.tensor([[0] * 5 + [1] + [2] * 18, [0] * 24])


def oracle(x: dict[str, Tensor], doc_ids: Tensor | None) -> Tensor:
    """½ Σ_j |p_ij − p⁰_ij| `[B, H, T]`."""
    B, G, T = x["k"].shape[:3]
    whole = x | {"v": torch.eye(T, dtype=x["q"].dtype).expand(B, G, T, T)}
    inputs = {
        "q_BHTd": whole["q"],
        "k_BGTd": whole["k"],
        "v_BGTv": whole["v"],
        "C_BHTs": whole["C"],
        "B_BGTs": whole["B"],
        "log_alpha_BGT": whole["log_alpha"],
        "theta_BGTm": whole["theta"],
    }
    scale = x["q"].shape[-1] ** -0.5
    with_it = sisa_dense(**inputs, lam_H=x["lam"], scale=scale, doc_ids_BT=doc_ids)
    without = sisa_dense(**inputs, lam_H=torch.zeros_like(x["lam"]), scale=scale, doc_ids_BT=doc_ids)
    return (with_it - without).abs().sum(-1) / 2


def sample(x: dict[str, Tensor], **options: object):  # type: ignore[no-untyped-def]
    return sampled_scores(**{name: value for name, value in x.items() if name != "v"}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("doc_ids", [None, DOCS])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("decay", [0.03, 40.0])
def test_all_rows_give_what_the_dense_score_gives(doc_ids, heads: int, kv_heads: int, decay: float) -> None:  # type: ignore[no-untyped-def]
    x = {n: z.detach() for n, z in make(24, heads=heads, kv_heads=kv_heads, decay=decay, size=2.0).items()}
    wanted = oracle(x, doc_ids)
    found = sample(x, rows=torch.arange(24), doc_ids=doc_ids)
    assert wanted.mean() > 0.02  # it moves something
    torch.testing.assert_close(found.moved, wanted.mean(), rtol=1e-12, atol=0)
    some = torch.tensor([3, 4, 5, 17])
    torch.testing.assert_close(
        sample(x, rows=some, doc_ids=doc_ids).moved, wanted[:, :, some].mean(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("doc_ids", [None, DOCS])
def test_the_largest_terms_are_those_of_visible_pairs(doc_ids) -> None:  # type: ignore[no-untyped-def]
    """Written as loops over pairs, in complex numbers: nothing of the code that is tested."""
    x = {n: z.detach() for n, z in make(24, kv_heads=1, decay=0.3).items()}
    content, importance = 0.0, 0.0
    turn = torch.exp(1j * x["theta"].cumsum(2))
    turned_C, turned_B = (torch.view_as_complex(x[n].unflatten(-1, (-1, 2)).contiguous()) * turn for n in "CB")
    g = x["log_alpha"].cumsum(2)
    for b in range(2):
        for i in range(24):
            for j in range(i + 1):
                if doc_ids is not None and doc_ids[b, i] != doc_ids[b, j]:
                    continue
                for h in range(2):
                    content = max(content, abs(float(x["q"][b, h, i] @ x["k"][b, 0, j]) * 8**-0.5))
                    together = float((turned_C[b, h, i].conj() * turned_B[b, 0, j]).real.sum())
                    decayed = float(torch.exp(g[b, 0, i] - g[b, 0, j])) * together
                    importance = max(importance, abs(float(x["lam"][h]) * decayed))
    found = sample(x, rows=torch.arange(24), doc_ids=doc_ids)
    assert float(found.content_max) == pytest.approx(content, rel=1e-12)
    assert float(found.importance_max) == pytest.approx(importance, rel=1e-12)


def test_groups_of_heads_and_16_bits_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: z.detach() for n, z in make(40, heads=4, kv_heads=2, dtype=torch.bfloat16, aux=torch.float32).items()}
    rows = torch.tensor([0, 11, 39])
    whole = sample(x, rows=rows)
    assert whole.moved.dtype == torch.float32
    monkeypatch.setattr(sampled, "_BYTES", 1)  # a head at a time
    torch.testing.assert_close(tuple(sample(x, rows=rows)), tuple(whole), rtol=1e-6, atol=0)
    exact = sample({n: z.double() for n, z in x.items()}, rows=rows)
    torch.testing.assert_close(tuple(z.double() for z in whole), tuple(exact), rtol=1e-5, atol=0)


def test_no_gradient_is_kept() -> None:
    assert not any(value.requires_grad for value in sample(make(8), rows=torch.arange(8)))
