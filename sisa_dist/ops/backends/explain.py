"""What the choice of backends looks like to a person: for `sisa doctor` and the run's log."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sisa_dist.config import UserError
from sisa_dist.ops.backends.choice import CUDA_ORDER, NAMES, Case, unfit
from sisa_dist.ops.backends.kernel import round_up
from sisa_dist.ops.backends.rectangle import products_up_to

ORDER = (*CUDA_ORDER[:-1], "cpu_flash", "products")


class Verdict(NamedTuple):
    """One backend: whether it serves the shape class, and why or why not."""

    name: str
    chosen: bool
    reason: str


def explain_backends(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    d_qk: int,
    d_v: int,
    group: int = 1,
    causal: bool = False,
    backend: str = "auto",
) -> list[Verdict]:
    """Every backend in the order `auto` tries them, whether it serves this shape class, and why.

    d_qk, d_v: channels of q̂ and of v (in a SISA layer d_h + d_s, one more with packed documents, and d_h); group:
    query heads a kv head; causal: the plain causal call, else the bisected path's rectangles; backend: as configured.
    Every kernel that is installed is probed, the chosen one or not. A named backend that cannot serve is not chosen,
    and no other is; a name that does not exist raises UserError.
    """
    if backend not in NAMES:
        raise UserError(f"attention.backend {backend!r} is unknown: set one of {', '.join(NAMES)}")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # A bisected call pads q̂ to v's width, whatever the kernel.
    case = Case(device, dtype, round_up(d_qk if causal else max(d_qk, d_v)), round_up(d_v), group, causal)
    refusals = {name: unfit(name, case) for name in ORDER}
    if backend == "auto":
        serving = [name for name in ORDER if refusals[name] is None]
        if device.type == "cpu" and not causal:
            return [Verdict(n, n in serving, refusals[n] or _share(n, dtype)) for n in ORDER]
        chosen, why, idle = serving[0], "the first of this order that serves", "usable, but not the first"
    else:
        chosen, why, idle = backend, "named in attention.backend", "usable, but attention.backend names another"
    return [
        Verdict(n, n == chosen and refusals[n] is None, refusals[n] or (why if n == chosen else idle)) for n in ORDER
    ]


def _share(name: str, dtype: torch.dtype) -> str:
    """Which rectangles a CPU backend gets: the number of keys decides (rectangle.py has the measurement)."""
    forward, backward = (products_up_to(dtype, backward=backward) for backward in (False, True))
    which = "more than" if name == "cpu_flash" else "at most"
    return f"rectangles of {which} {forward} keys (backward: {which} {backward})"
