"""Tri Dao's flash-attention packages, versions 2 and 4: optional, imported only when asked for.

Forwards go by the public functions, which return lse on request. Backwards from a given out and lse are not public;
their parameters changed from release to release (window_size became two numbers, softcap came in 2.6), so what a
function declares is read from its signature and only that is passed. Both packages take heads third.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sisa_dist.ops.backends.kernel import HALVES, Kernel

Three = tuple[Tensor, Tensor, Tensor]

TWO = "flash_attn.flash_attn_interface"
FOUR = "flash_attn.cute.interface"


@functools.cache
def _missing(module: str, remedy: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # absent, built against another torch, or without its own dependencies
        return f"{remedy} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None


def _missing_two() -> str | None:
    return _missing(TWO, "flash-attn is not usable: pip install --no-build-isolation flash-attn")


def _missing_four() -> str | None:
    return _missing(FOUR, "flash-attn-4 is not usable: pip install --pre flash-attn-4")


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names a function takes. torch.library.custom_op, which flash-attn wraps with from 2.7 on, hides them."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


def _call(function: Callable[..., Any], known: dict[str, Any]) -> Any:
    """The function with whichever of the known arguments it declares."""
    names = _parameters(function)
    return function(**{name: value for name, value in known.items() if name in names})


def _heads_third(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _two(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    function = importlib.import_module(TWO).flash_attn_func
    q, k, v = _heads_third(q, k, v)
    # "attn_probs" returns out, lse and the dropout mask, which without dropout is not computed.
    out, lse, _ = function(q, k, v, dropout_p=0.0, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out.transpose(1, 2), lse


def _two_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> Three:
    dout, q, k, v, out = _heads_third(dout, q, k, v, out)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    known: dict[str, Any] = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse.contiguous()}
    known |= {"dq": dq, "dk": dk, "dv": dv, "dropout_p": 0.0, "softmax_scale": scale, "causal": causal}
    known |= {"window_size": (-1, -1), "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
    known |= {"alibi_slopes": None, "deterministic": torch.are_deterministic_algorithms_enabled()}
    _call(importlib.import_module(TWO)._flash_attn_backward, known)  # fills dq, dk, dv
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _four(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    function = importlib.import_module(FOUR).flash_attn_func
    q, k, v = _heads_third(q, k, v)
    known = {"q": q, "k": k, "v": v, "softmax_scale": scale, "causal": causal, "return_lse": True}
    out, lse, *_ = _call(function, known)
    return out.transpose(1, 2), lse


def _four_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> Three:
    dout, q, k, v, out = _heads_third(dout, q, k, v, out)
    known: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "dout": dout,
        "lse": lse.contiguous(),
        "softmax_scale": scale,
    }
    known |= {"causal": causal, "deterministic": torch.are_deterministic_algorithms_enabled()}
    dq, dk, dv, *_ = _call(importlib.import_module(FOUR)._flash_attn_bwd, known)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


FLASH_ATTN_2 = Kernel(_two, _two_backward, HALVES, "cuda", one_width=True, missing=_missing_two)
FLASH_ATTN_4 = Kernel(_four, _four_backward, HALVES, "cuda", missing=_missing_four)
