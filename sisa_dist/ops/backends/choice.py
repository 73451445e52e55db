"""Which kernel serves a shape class: from device, dtype, head widths and the configured name, never from values.

`auto` tries CUDA_ORDER and takes the first that is installed, takes these shapes, and agrees with the oracle
(probe.py); each is probed at most once a process for a shape class. On CPU there is no probe: both candidates come
with PyTorch and with this package, the test suite compares them, and a start must not pay for it. A kernel asked for
by name serves or is refused: no other takes its place.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.backends.kernel import FLOATS, Kernel
from sisa_dist.ops.backends.packages import FLASH_ATTN_2, FLASH_ATTN_4
from sisa_dist.ops.backends.probe import disagreement
from sisa_dist.ops.backends.torch_kernels import CPU_FLASH, SDPA_CUDNN, SDPA_EFFICIENT, SDPA_FLASH
from sisa_dist.ops.products import products_backward, products_forward

logger = logging.getLogger(__name__)


def _products(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = products_forward(q, k, v, scale=scale, causal=causal)
    return out.transpose(0, 1), lse.transpose(0, 1)


def _products_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    delta = (dout.to(lse.dtype) * out).sum(-1)
    dout, q, k, v, lse, delta = (x.transpose(0, 1) for x in (dout, q, k, v, lse, delta))
    dq, dk, dv = products_backward(dout, q, k, v, lse, delta, scale=scale, causal=causal)
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


KERNELS: dict[str, Kernel] = {
    "sdpa_flash": SDPA_FLASH,
    "sdpa_cudnn": SDPA_CUDNN,
    "sdpa_efficient": SDPA_EFFICIENT,
    "flash_attn_2": FLASH_ATTN_2,
    "flash_attn_4": FLASH_ATTN_4,
    "cpu_flash": CPU_FLASH,
    "products": Kernel(_products, _products_backward, FLOATS, "any", max_width=1 << 30),
}
NAMES = ("auto", *KERNELS)

# What somebody took the trouble to install comes first, newest first; then PyTorch's own, flash before cuDNN because
# cuDNN builds a plan for every new shape (the bisected path has one a level) and hides more behind its heuristics;
# memory-efficient, which alone knows fp32; at last the products, which hold a rectangle's scores in memory.
# By reputation and documentation: no GPU was at hand to time them.
CUDA_ORDER = ("flash_attn_4", "flash_attn_2", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "products")


class Case(NamedTuple):
    """A shape class: head widths, multiples of 8; query heads a kv head; one causal call, or rectangles."""

    device: torch.device
    dtype: torch.dtype
    d_qk: int
    d_v: int
    group: int
    causal: bool

    def __str__(self) -> str:
        shape = "causal" if self.causal else "rectangles"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape}, {dtype}, d_qk {self.d_qk}, d_v {self.d_v}, {self.group} query heads a kv head, {self.device}"


def check_name(name: str, device: torch.device) -> None:
    """UserError for a backend that does not exist, or not on this device. Costs nothing: neither import nor probe.

    On the meta device, where nothing is computed, any will do.
    """
    if name not in NAMES:
        raise UserError(f"attention.backend {name!r} is unknown: set one of {', '.join(NAMES)}")
    if name != "auto" and KERNELS[name].device not in ("any", device.type) and device.type != "meta":
        here = ["auto", *(n for n, kernel in KERNELS.items() if kernel.device in ("any", device.type))]
        raise UserError(
            f"attention.backend {name} runs on {KERNELS[name].device} only: on {device.type} set {' or '.join(here)}"
        )


@functools.cache
def unfit(name: str, case: Case) -> str | None:
    """Why a backend cannot serve a shape class; None where it can. Probes at most once a process."""
    kernel = KERNELS[name]
    if kernel.device not in ("any", case.device.type):
        return f"runs on {kernel.device} only"
    if case.dtype not in kernel.dtypes:
        return f"has no {str(case.dtype).removeprefix('torch.')} kernel"
    if max(case.d_qk, case.d_v) > kernel.max_width:
        return f"takes heads up to {kernel.max_width} channels, not {max(case.d_qk, case.d_v)}"
    if (missing := kernel.missing()) is not None:
        return missing
    if name in ("products", "cpu_flash"):
        return None
    return disagreement(kernel, **case._asdict())


@functools.cache
def choose(case: Case, wanted: str) -> str:
    """The backend of a shape class on CUDA, or by name anywhere; UserError if the wanted one cannot serve it."""
    check_name(wanted, case.device)
    if wanted != "auto":
        if (reason := unfit(wanted, case)) is not None:
            raise UserError(
                f"attention.backend {wanted} cannot serve {case}: {reason}; or set attention.backend to auto"
            )
        return wanted
    if case.device.type != "cuda":
        return "products"
    refused = []
    for name in CUDA_ORDER:
        if (reason := unfit(name, case)) is None:
            break
        refused.append(f"; not {name}: {reason}")
    logger.info("attention backend for %s: %s%s", case, name, "".join(refused))
    return name
