"""The score of windows that lie on several ranks equals one process's, output and every gradient, in fp64 to 1e-10."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ops.ops_cases import as_fp64, assert_close, make, value_and_gradients
from torch import Tensor

from distributed.pool import run_job
from sisa_dist.config import AttentionConfig
from sisa_dist.model.mixers.sisa import SisaScore
from sisa_dist.parallel import collectives, context_score
from sisa_dist.parallel.context import UlyssesScore, ZigzagPlacement
from sisa_dist.parallel.context_group import Context, Returns
from sisa_dist.parallel.context_score import context_attention

T = 48


def score_on_ranks(
    kind: str, options: dict[str, Any], with_documents: bool, mistake: str | None = None
) -> dict[str, Tensor]:
    """Output and gradients of all positions, put together of the ranks'; λ's summed over them."""
    with mistaken(mistake):
        return _score_on_ranks(kind, options, documents() if with_documents else None)


def _score_on_ranks(kind: str, options: dict[str, Any], docs: Tensor | None) -> dict[str, Tensor]:
    context = Context(dist.group.WORLD, kind)
    placement = ZigzagPlacement(context)
    x = {name: z.detach() for name, z in make(T, **options).items()}
    cotangent = _cotangent(x)
    mine = {n: (z if n == "lam" else placement.own(z, dim=2)).clone().requires_grad_() for n, z in x.items()}
    out = context_attention(*mine.values(), context=context, doc_ids=docs, leaf=4, backend="auto")
    grads = dict(zip(mine, torch.autograd.grad(out, list(mine.values()), placement.own(cotangent, dim=2)), strict=True))
    dist.all_reduce(grads["lam"])
    found = {"out": out.detach(), **grads}
    return {n: z if n == "lam" else _whole(z, placement) for n, z in found.items()}


def _whole(x: Tensor, placement: ZigzagPlacement) -> Tensor:
    return placement.whole(x.transpose(1, 2).contiguous()).transpose(1, 2)


def _cotangent(x: dict[str, Tensor]) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    shape = (*x["q"].shape[:3], x["v"].shape[-1])
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(x["q"].dtype)


def documents() -> Tensor:
    """Row 0: one document ends inside a stretch, one spans several; row 1: an edge on a stretch's, then inside."""
    rows = torch.zeros(2, T, dtype=torch.int64)
    rows[0, 5:] += 1
    rows[0, 37:] += 3
    rows[1, 12:] += 1
    rows[1, 20:] += 1
    rows[1, 46:] += 1
    return rows


CASES = {
    "weak decay": {"decay": 0.03},
    "strong decay": {"decay": 6.0},
    "decay that underflows": {"decay": 120.0},
    "grouped heads": {"heads": 4, "kv_heads": 2, "decay": 0.3, "theta": 40.0},
    "other widths": {"d_h": 6, "d_v": 10, "d_s": 2, "decay": 0.3},
    "no decay channels": {"d_s": 0, "heads": 4, "kv_heads": 2},
}


ON_FOUR = ("strong decay", "grouped heads")  # the others there are slow


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=[pytest.mark.slow] if ranks == 4 and name not in ON_FOUR else [])
        for ranks in (2, 4)
        for name in CASES
    ],
)
@pytest.mark.parametrize("kind", ["all_gather", "ring"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_score_over_ranks_equals_one_process(name: str, kind: str, ranks: int, with_documents: bool) -> None:
    options = CASES[name]
    docs = documents() if with_documents else None
    want = value_and_gradients(make(T, **options), path="dense", doc_ids=docs)
    got = run_job(ranks, score_on_ranks, kind, options, with_documents)
    for found in got:
        assert_close({n: found[n] for n in want}, want, 1e-10)


@pytest.mark.parametrize("kind", ["all_gather", "ring"])
def test_fp32_over_a_long_window_stays_as_exact_as_one_process(kind: str) -> None:
    """Strong decay and a phase that turns often, whose sums over the window have lost their digits in fp32."""
    options = dict(decay=1.6, theta=30.0, batch=1, d_h=16, d_s=8)
    want = value_and_gradients(as_fp64(make(LONG, dtype=torch.float32, **options)), path="dense")
    got = run_job(2, long_on_ranks, kind, options)[0]
    assert_close({n: got[n] for n in want}, want, 1e-5)


LONG = 1024


def long_on_ranks(kind: str, options: dict[str, Any]) -> dict[str, Tensor]:
    with mock.patch(f"{__name__}.T", LONG):
        return _score_on_ranks(kind, {"dtype": torch.float32, **options}, None)


# --- no document has a part in another


def after_a_change(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the ranks find, and find once all inputs of row 0's first and last documents are others."""
    options = {"decay": 0.3, "theta": 3.0}
    first = _score_on_ranks(kind, options, documents())
    real, other = make, make(T, **options, seed=9)

    def changed(T: int, **options: Any) -> dict[str, Tensor]:
        x = {name: z.detach().clone() for name, z in real(T, **options).items()}
        for name in set(x) - {"lam"}:
            for part in (slice(0, 5), slice(37, T)):
                x[name][0, :, part] = other[name].detach()[0, :, part]
        return x

    with mock.patch(f"{__name__}.make", changed):
        return first, _score_on_ranks(kind, options, documents())


@pytest.mark.parametrize("kind", ["all_gather", "ring"])
def test_a_document_feels_no_other_to_the_bit(kind: str) -> None:
    first, second = run_job(2, after_a_change, kind)[0]
    for name in set(first) - {"lam"}:
        mine, again = (found[name][0, :, 5:37] for found in (first, second))
        if name in ("log_alpha", "theta"):  # sums of gradients, as differences of fp64 sums that others are in
            torch.testing.assert_close(mine, again, rtol=0, atol=1e-12)
        else:
            assert torch.equal(mine, again), name
        assert not torch.equal(first[name][0, :, :5], second[name][0, :, :5])


def gradients_of_one(kind: str) -> dict[str, Tensor]:
    """Where only row 0's second document is looked at."""
    real = _cotangent

    def of_one(x: dict[str, Tensor]) -> Tensor:
        cotangent = real(x)
        cotangent[1] = cotangent[0, :, :5] = cotangent[0, :, 37:] = 0
        return cotangent

    with mock.patch(f"{__name__}._cotangent", of_one):
        return _score_on_ranks(kind, {"decay": 0.3, "theta": 3.0}, documents())


@pytest.mark.parametrize("kind", ["all_gather", "ring"])
def test_a_document_gives_others_no_gradient_at_all(kind: str) -> None:
    found = run_job(2, gradients_of_one, kind)[0]
    for name in set(found) - {"lam", "out"}:
        assert found[name][0, :, 6:37].abs().max() > 0.01, name
        others = found[name][1], found[name][0, :, :5], found[name][0, :, 37:]
        assert not any(part.any() for part in others), name


# --- traffic


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends, by collective, if each is done in the fewest: R − 1 parts of a gather, of a sum."""
    sent: dict[str, int] = {}

    def wrapped(name: str, real: Any, bytes_of: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            sent[name] = sent.get(name, 0) + bytes_of(*arguments)
            return real(*arguments, **options)

        return call

    ranks = dist.get_world_size()
    counts = {
        "_all_gather_single": lambda every, x: (ranks - 1) * x.nbytes,
        "_reduce_scatter_single": lambda mine, parts: (ranks - 1) * mine.nbytes,
    }
    moves = {
        "batch_isend_irecv": lambda moves: sum(move.tensor.nbytes for move in moves if move.op is dist.isend),
        "all_to_all_single": lambda found, x, received, to: x.nbytes * (sum(to) - to[dist.get_rank()]) // sum(to),
    }
    with contextlib.ExitStack() as stack:
        for place, of in ((collectives, counts), (dist, moves)):
            for name, bytes_of in of.items():
                stack.enter_context(
                    mock.patch.object(place, name, wrapped(name.strip("_"), getattr(place, name), bytes_of))
                )
        yield sent


def traffic(kind: str, options: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Sent forward, and backward."""
    context = Context(dist.group.WORLD, kind)
    placement = ZigzagPlacement(context)
    x = make(T, **options)
    mine = {n: (z if n == "lam" else placement.own(z, dim=2)).detach().requires_grad_() for n, z in x.items()}
    with counted() as forward:
        if kind == "ulysses":
            scored = UlyssesScore(context, SisaScore(AttentionConfig(), None))(*mine.values(), doc_ids=None, cache=None)
        else:
            scored = context_attention(*mine.values(), context=context, doc_ids=None, leaf=4, backend="auto")
    with counted() as backward:
        scored.sum().backward()
    return forward, backward


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("aux", [torch.float32, torch.bfloat16])
def test_traffic_is_what_the_formula_says(ranks: int, aux: torch.dtype) -> None:
    options = dict(batch=2, heads=8, kv_heads=4, d_h=16, d_v=8, d_s=6, dtype=aux, aux=torch.float32)
    keys = (ranks - 1) * 2 * 4 * T // ranks * (16 + 6 + 8)
    scalars = (ranks - 1) * 2 * 2 * 4 * (1 + 3) * 8
    width = aux.itemsize
    forward, backward = run_job(ranks, traffic, "all_gather", options)[0]
    assert forward == {"all_gather_single": keys * width + scalars}
    assert backward == {"all_gather_single": keys * width + scalars, "reduce_scatter_single": keys * 4}
    forward, backward = run_job(ranks, traffic, "ring", options)[0]
    assert forward == {"all_gather_single": scalars, "batch_isend_irecv": keys * width}
    assert backward == {"all_gather_single": scalars, "batch_isend_irecv": keys * (width + 4)}
    # query heads: q, C, out; kv heads: k, v, B, and in fp32 log α and θ
    heads = (8 * (16 + 6 + 8) + 4 * (16 + 8 + 6)) * width + 4 * (1 + 3) * 4
    one_way = 2 * T // ranks * heads * (ranks - 1) // ranks
    assert run_job(ranks, traffic, "ulysses", options) == [({"all_to_all_single": one_way},) * 2] * ranks


# --- mistakes


def _with(name: str, change: Any, *, of: Any = context_score) -> Any:
    real = getattr(of, name)
    return mock.patch.object(of, name, lambda *arguments, **options: change(real, *arguments, **options))


def _not_rebased(real: Any, *arguments: Any, **options: Any) -> Any:
    found = real(*arguments, **options)
    return found._replace(fall=torch.ones_like(found.fall))


def _decay_between_forgotten(real: Any, totals: Tensor, *arguments: Any, **options: Any) -> Tensor:
    still = totals.clone()
    still[..., 0] = 0
    return real(still, *arguments, **options)


def _phase_between_forgotten(real: Any, totals: Tensor, *arguments: Any, **options: Any) -> Tensor:
    still = totals.clone()
    still[..., 1:] = 0
    return real(still, *arguments, **options)


MISTAKES: dict[str, tuple[Any, str]] = {  # and the first term that must be red
    "a shard not rebased": (lambda: _with("frames", _not_rebased), "out"),
    "a zigzag half swapped": (
        lambda: mock.patch.object(
            Context, "held_by", lambda self, rank: (2 * self.size - 1 - rank, rank)[:: 1 - 2 * rank]
        ),
        "out",
    ),
    "decay between stretches forgotten": (lambda: _with("link", _decay_between_forgotten), "out"),
    "phase between stretches forgotten": (lambda: _with("link", _phase_between_forgotten), "out"),
    "gradients of sums end with the stretch": (
        lambda: _with("sums_beyond", lambda real, *x: torch.zeros_like(real(*x))),
        "log_alpha",
    ),
    "gradients of sums go on into the next document": (
        lambda: _with("sums_beyond", lambda real, sums, docs, mine: real(sums, None, mine)),
        "theta",
    ),
    "others' gradients of keys left behind": (lambda: mock.patch.object(Returns, "sum", lambda self: self._own), "k"),
    "a part of the softmax left out": (lambda: _with("merge_", lambda real, *x: None), "out"),
}


@contextlib.contextmanager
def mistaken(name: str | None) -> Iterator[None]:
    with contextlib.nullcontext() if name is None else MISTAKES[name][0]():
        yield


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str) -> None:
    options = {"decay": 0.2, "theta": 2.0}
    docs = documents()
    want = value_and_gradients(make(T, **options), path="dense", doc_ids=docs)
    got = run_job(2, score_on_ranks, "ring", options, True, name)[0]
    term = MISTAKES[name][1]
    with pytest.raises(AssertionError, match=term):
        assert_close({term: got[term]}, {term: want[term]}, 1e-3)
