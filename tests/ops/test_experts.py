"""Rows by expert and back, and the grouped products: against a loop over tokens written from the definition."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.experts import arrange, combine, dispatch, grouped_matmul
from sisa_dist.ops.experts import backends as backends_module
from sisa_dist.ops.experts.backends import BACKENDS, MEGABLOCKS
from sisa_dist.ops.experts.choice import check_backend, choose, unfit
from sisa_dist.ops.experts.rows import ALIGN

CPU = torch.device("cpu")


def choices(tokens: int, experts: int, top_k: int, *, seed: int = 0, never: int | None = None) -> Tensor:
    """[N, K], an expert at most once a token; `never` is chosen by none."""
    score = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    if never is not None:
        score[:, never] = -1.0
    return score.topk(top_k).indices


@pytest.mark.parametrize(("first", "count"), [(0, 5), (0, 2), (3, 2), (2, 1)])
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_choice_has_a_row_and_every_row_one_choice(first: int, count: int, top_k: int) -> None:
    expert_NK = choices(23, 5, top_k, never=3)
    rows = arrange(expert_NK, first=first, count=count, total=5)
    ends = rows.ends_E.tolist()
    assert all(end % ALIGN == 0 for end in ends) and ends == sorted(ends) and ends[-1] <= len(rows.token_M)
    seen = set()
    for token in range(23):
        for k in range(top_k):
            local = int(expert_NK[token, k]) - first
            assert bool(rows.elsewhere_NK[token, k]) == (not 0 <= local < count)
            if 0 <= local < count:
                row = int(rows.row_NK[token, k])
                assert ([0, *ends][local]) <= row < ends[local] and not rows.empty_M[row]
                assert int(rows.token_M[row]) == token and int(rows.choice_M[row]) == token * top_k + k
                seen.add(row)
    assert set((~rows.empty_M).nonzero()[:, 0].tolist()) == seen
    # Of one expert, tokens stand in their order: the same bits every time.
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        kept = rows.token_M[start:end][~rows.empty_M[start:end]]
        assert kept.tolist() == sorted(kept.tolist())


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize(("first", "count"), [(0, 4), (2, 2)])
def test_the_whole_way_equals_a_loop_over_tokens(backend: str, first: int, count: int) -> None:
    dtype = torch.float64 if backend == "loop" else torch.float32
    torch.manual_seed(1)
    width = 12 if backend == "torch" else 6
    x_ND, expert_NK = torch.randn(19, width, dtype=dtype), choices(19, 4, 2, never=1)
    weight_NK, weight_EDF = torch.rand(19, 2, dtype=dtype), torch.randn(4, width, 8, dtype=dtype)
    grad_NF = torch.randn(19, 8, dtype=dtype)

    def ours(x: Tensor, weight: Tensor, matrices: Tensor) -> Tensor:
        rows = arrange(expert_NK, first=first, count=count, total=4)
        return combine(grouped_matmul(dispatch(x, rows), matrices[first : first + count], rows.ends_E), weight, rows)

    def plain(x: Tensor, weight: Tensor, matrices: Tensor) -> Tensor:
        out = []
        for n in range(19):
            here = [k for k in range(2) if first <= expert_NK[n, k] < first + count]
            out.append(sum((weight[n, k] * (x[n] @ matrices[expert_NK[n, k]]) for k in here), x.new_zeros(8)))
        return torch.stack(out)

    def gradients(function: Any) -> list[Tensor]:
        leaves = [leaf.clone().requires_grad_() for leaf in (x_ND, weight_NK, weight_EDF)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad_NF)]

    assert choose(CPU, dtype, "auto") == backend
    for got, want in zip(gradients(ours), gradients(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


def test_widths_that_a_kernel_refuses_go_by_the_loop_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert choose(CPU, torch.float32, "auto", aligned=False) == "loop"
    assert "not torch: d_model or an expert's d_ff is no multiple of 16 bytes" in caplog.text
    y = grouped_matmul(torch.randn(8, 6), torch.randn(1, 6, 5), torch.tensor([8], dtype=torch.int32))
    assert y.shape == (8, 5)


def test_no_token_of_these_experts_at_all() -> None:
    rows = arrange(torch.zeros(5, 1, dtype=torch.int64), first=2, count=2, total=4)
    x_ND = torch.randn(5, 8, requires_grad=True)
    matrices = torch.randn(2, 8, 8, requires_grad=True)
    out = combine(grouped_matmul(dispatch(x_ND, rows), matrices, rows.ends_E), torch.ones(5, 1), rows)
    out.sum().backward()
    assert x_ND.grad is not None and matrices.grad is not None
    assert not out.any() and not x_ND.grad.any() and not matrices.grad.any()


def test_a_bf16_row_takes_fp32_masters_and_keeps_none_of_their_copies() -> None:
    x = torch.randn(16, 8, dtype=torch.bfloat16)
    weight = torch.randn(2, 8, 8, requires_grad=True)
    y = grouped_matmul(x, weight, torch.tensor([8, 16], dtype=torch.int32))
    assert y.dtype == torch.bfloat16
    kept = [tensor for tensor in y.grad_fn.saved_tensors if tensor.shape == weight.shape]  # type: ignore[union-attr]
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def fake_megablocks(monkeypatch: pytest.MonkeyPatch, *, wrong: bool = False) -> list[str]:
    """megablocks' grouped GEMM as its callers know it: sizes int64 on the host, operands contiguous, rows all used."""
    calls: list[str] = []

    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
        assert batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu" and not (trans_a and trans_b)
        assert a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype == torch.bfloat16
        assert int(batch_sizes.sum()) == a.shape[0]
        calls.append("trans_a" if trans_a else "trans_b" if trans_b else "plain")
        groups = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes)
        if trans_a:
            assert b.shape[0] == a.shape[0]
            out = torch.full((len(batch_sizes), a.shape[1], b.shape[1]), float("nan"), dtype=a.dtype)
            for e in groups.unique().tolist():
                out[e] = a[groups == e].t() @ b[groups == e]
            return out
        matrices = b.transpose(1, 2) if trans_b else b
        parts = [a[groups == e] @ matrices[e] for e in range(len(batch_sizes))]
        return torch.cat(parts) * (1.5 if wrong else 1.0)

    module = types.ModuleType(MEGABLOCKS)
    module.backend = types.SimpleNamespace(gmm=gmm)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MEGABLOCKS, module)
    forget()
    return calls


def forget() -> None:
    for cached in (choose, unfit, backends_module.megablocks_missing):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    forget()
    yield
    forget()


def test_megablocks_gives_what_the_loop_gives_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_megablocks(monkeypatch)
    assert unfit("megablocks", CPU, torch.bfloat16) is None
    assert {"plain", "trans_a", "trans_b"} <= set(calls)
    ends_E = torch.tensor([8, 8, 24], dtype=torch.int32)
    results = []
    for name in ("megablocks", "loop"):
        torch.manual_seed(0)
        x = torch.randn(40, 16, dtype=torch.bfloat16)
        weight = torch.randn(3, 16, 8, dtype=torch.bfloat16)
        dy = torch.randn(40, 8, dtype=torch.bfloat16)
        backend = BACKENDS[name]
        results.append((backend.rows(x, weight, ends_E)[:24], backend.matrices(x, dy, ends_E)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["torch", "megablocks"])
def test_a_kernel_of_the_gpu_is_the_loop_with_every_gradient(name: str) -> None:
    if name == "megablocks" and (reason := backends_module.megablocks_missing()) is not None:
        pytest.skip(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    assert unfit(name, device, torch.bfloat16) is None
    torch.manual_seed(0)
    rows = arrange(choices(200, 8, 2, never=3).to(device), first=0, count=8, total=8)
    x = torch.randn(len(rows.token_M), 64, device=device)
    weight, dy = torch.randn(8, 64, 96, device=device), torch.randn(len(rows.token_M), 96, device=device)
    used, found = int(rows.ends_E[-1]), []
    for backend, dtype in ((name, torch.bfloat16), ("loop", torch.float64)):
        x_leaf, weight_leaf = (z.to(torch.bfloat16).to(dtype).requires_grad_() for z in (x, weight))
        assert choose(device, dtype, "auto" if backend == "loop" else backend) == backend
        y = grouped_matmul(x_leaf, weight_leaf, rows.ends_E, backend="auto" if backend == "loop" else backend)[:used]
        dx, dweight = torch.autograd.grad(y, (x_leaf, weight_leaf), dy[:used].to(torch.bfloat16).to(dtype))
        found.append((y, dx[:used], dweight))  # rows behind the last group are undefined
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).abs().max() < 2**-6 * want.abs().max()


def test_megablocks_that_is_wrong_or_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_megablocks(monkeypatch, wrong=True)
    assert "differ" in str(unfit("megablocks", CPU, torch.bfloat16))
    assert "no float32 kernel" in str(unfit("megablocks", CPU, torch.float32))
    monkeypatch.setitem(sys.modules, MEGABLOCKS, None)
    forget()
    assert "pip install 'megablocks[gg]'" in str(unfit("megablocks", CPU, torch.bfloat16))
    with pytest.raises(UserError, match="megablocks runs on cuda only: on cpu set it to auto or torch"):
        check_backend("megablocks", CPU)
    with pytest.raises(UserError, match="pip install"):
        check_backend("megablocks", torch.device("cuda"))
    check_backend("megablocks", torch.device("meta"))
