"""Recurrent mixers whose windows lie on several ranks equal one process's, output and every gradient, in fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed.pool import run_job
from distributed.test_context import T, counted, documents
from mixer_cases import config_of, mixer_of
from sisa_dist.config import AttentionConfig
from sisa_dist.model.mixers import MIXERS, Mixer
from sisa_dist.ops.passing import states_before
from sisa_dist.parallel import context_state
from sisa_dist.parallel.context import ZigzagPlacement
from sisa_dist.parallel.context_group import Context
from sisa_dist.parallel.context_state import place_in_mixer

NAMES = ("mamba", "mamba2_groups", "mamba3", "mamba3_mimo")


def mixer(name: str, *, dtype: torch.dtype = torch.float64) -> Mixer:
    """With weights at which neither decay nor what is carried is small."""
    config = config_of(name)
    found = MIXERS[mixer_of(name)](config, 0, AttentionConfig())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in found.named_parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            if path.endswith("dt_bias"):
                parameter -= 2
    return found.to(dtype)


def window(length: int, seed: int) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found_by(mixed: Mixer, x: Tensor, cotangent: Tensor, docs: Tensor | None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = mixed(x, None, docs)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    names, parameters = zip(*mixed.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [x, *parameters], cotangent)
    return {"out": out.detach(), **dict(zip(("x", *names), gradients, strict=True))}


def on_ranks(name: str, length: int, docs: Tensor | None, mistake: str | None = None) -> dict[str, Tensor]:
    """Output and x's gradient of all positions, put together of the ranks'; the parameters' summed over them."""
    with contextlib.nullcontext() if mistake is None else MISTAKES[mistake][1]():
        context = Context(dist.group.WORLD, "all_gather")
        placement, mixed = ZigzagPlacement(context), mixer(name)
        for module in list(mixed.modules()):
            place_in_mixer(module, context)
        mine = found_by(mixed, placement.own(window(length, 1)), placement.own(window(length, 2)), docs)
        whole = {term: placement.whole(mine.pop(term).contiguous()) for term in ("out", "x")}
        for gradient in mine.values():
            dist.all_reduce(gradient)
    return whole | mine


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {term: ((got[term] - x).abs().max() / x.abs().max()).item() for term, x in want.items()}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_mixer_over_ranks_equals_one_process(name: str, with_documents: bool, ranks: int) -> None:
    docs = documents() if with_documents else None
    want = found_by(mixer(name), window(T, 1), window(T, 2), docs)
    for got in run_job(ranks, on_ranks, name, T, docs):
        errors = worst(got, want)
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("length", [4, 8])
def test_stretches_shorter_than_the_convolution(length: int) -> None:
    """1 and 2 tokens, where it reaches 3 back, as of short texts that are scored."""
    docs = torch.tensor([[0] * length, [0, 1, 1, 1, 1, 1, 2, 2][:length]])
    want = found_by(mixer("mamba2"), window(length, 1), window(length, 2), docs)
    for got in run_job(2, on_ranks, "mamba2", length, docs):
        errors = worst(got, want)
        assert max(errors.values()) < 1e-10, errors


# --- traffic

WINDOWS, HEADS, STATE, WIDTH = 2, 4, 12, 64  # of mixer_cases.BASE with ssm
ROWS = {"mamba": 64 * (6 + 6), "mamba2": HEADS * (STATE * 16 + 1), "mamba3": HEADS * (STATE * 16 + 1)}
EDGES = {"mamba": 3 * WIDTH, "mamba2": 3 * (WIDTH + 2 * STATE), "mamba3": HEADS}  # numbers of a window that cross one


def traffic(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes sent forward, and backward."""
    context = Context(dist.group.WORLD, "all_gather")
    mixed = mixer(name, dtype=torch.float32)
    for module in list(mixed.modules()):
        place_in_mixer(module, context)
    x = ZigzagPlacement(context).own(window(T, 1)).float().requires_grad_()
    with counted() as forward:
        out = mixed(x, None, None)  # type: ignore[arg-type]
    with counted() as backward:
        out.sum().backward()  # type: ignore[union-attr]
    return forward, backward


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ROWS)
def test_traffic_is_what_the_formula_says(name: str, ranks: int) -> None:
    states = (ranks - 1) * 2 * WINDOWS * ROWS[name] * 4
    phase = (ranks - 1) * 2 * WINDOWS * HEADS * (STATE // 4) * 8 if name == "mamba3" else 0
    for rank, (forward, backward) in enumerate(run_job(ranks, traffic, name)):
        edges = (1 if rank in (0, ranks - 1) else 2) * WINDOWS * EDGES[name] * 4
        assert forward == {"all_gather_single": states + phase, "all_to_all_single": edges}
        gathered = {"all_gather_single": phase} if phase else {}
        assert backward == {"reduce_scatter_single": states, "all_to_all_single": edges} | gathered


# --- mistakes


def _replaced(name: str, by: Any) -> Any:
    real = getattr(context_state, name)
    return lambda: mock.patch.object(context_state, name, lambda *x, **options: by(real, *x, **options))


@contextlib.contextmanager
def _only_its_own() -> Iterator[None]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.context.own(grad), None

    with mock.patch.object(context_state._InOrder, "backward", staticmethod(backward)):
        yield


MISTAKES: dict[str, tuple[str, Any, str]] = {  # the mixer, the mistake, the term that must be red
    "edges dropped": ("mamba2", _replaced("_to_neighbours", lambda real, x, *_, **__: torch.zeros_like(x)), "out"),
    "the next step dropped": (
        "mamba3",
        _replaced("_to_neighbours", lambda real, x, *_, **__: torch.zeros_like(x)),
        "wtrap.weight",
    ),
    "edges of another document": (
        "mamba",
        _replaced("same_document", lambda real, *x: torch.ones_like(real(*x))),
        "out",
    ),
    "only the state of the stretch before": (
        "mamba2",
        _replaced("states_before", lambda real, left, kept, docs: real(left, 0 * kept, docs)),
        "out",
    ),
    "states in the wrong order": (
        "mamba",
        _replaced("states_before", lambda real, left, kept, docs: real(left.flip(0), kept, docs)),
        "out",
    ),
    "states go on into the next document": (
        "mamba2",
        _replaced("states_before", lambda real, left, kept, docs: real(left, kept, None)),
        "out",
    ),
    "others' gradients of states left behind": ("mamba3_mimo", _only_its_own, "wB.weight"),
    "phase between stretches forgotten": (
        "mamba3",
        _replaced(
            "states_before", lambda real, *x: 0 * real(*x) if x[0].shape[-1] == STATE // 4 else states_before(*x)
        ),
        "out",
    ),
    "gradients of the phase end with the stretch": (
        "mamba3",
        _replaced("sums_beyond", lambda real, *x: torch.zeros_like(real(*x))),
        "wangle.weight",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str) -> None:
    of, _, term = MISTAKES[name]
    want = found_by(mixer(of), window(T, 1), window(T, 2), documents())
    got = run_job(2, on_ranks, of, T, documents(), name)[0]
    assert worst(got, want)[term] > 1e-4
