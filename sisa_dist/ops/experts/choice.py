"""Which backend multiplies the experts' groups: probed once a device and dtype against the loop, and said once."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.experts.backends import BACKENDS, megablocks_missing

logger = logging.getLogger(__name__)


def check_backend(wanted: str, device: torch.device) -> None:
    """UserError where the backend asked for does not exist on this device. On meta nothing is computed: any will do."""
    if wanted != "megablocks" or device.type == "meta":
        return
    if device.type != "cuda":
        raise UserError(f"model.moe.backend megablocks runs on cuda only: on {device.type} set it to auto or torch")
    if (reason := megablocks_missing()) is not None:
        raise UserError(f"model.moe.backend megablocks: {reason}; or set it to auto")


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, wanted: str, aligned: bool = True) -> str:
    """The name in BACKENDS that serves. `auto` takes what was installed on purpose, then PyTorch's, then the loop.

    `aligned`: the widths are multiples of 16 bytes. Raises UserError where the wanted one cannot serve; `torch` falls
    to the loop where PyTorch has no kernel, which is the same function and is said.
    """
    check_backend(wanted, device)
    if wanted == "megablocks":
        if (reason := _reason("megablocks", device, dtype, aligned)) is not None:
            raise UserError(f"model.moe.backend megablocks cannot serve: {reason}; or set it to auto")
        return wanted
    refused = []
    for name in ("megablocks", "torch") if wanted == "auto" and device.type == "cuda" else ("torch",):
        if (reason := _reason(name, device, dtype, aligned)) is None:
            break
        refused.append(f"; not {name}: {reason}")
    else:
        name = "loop"
    kind = str(dtype).removeprefix("torch.")
    logger.info("products of experts in %s on %s: %s%s", kind, device.type, name, "".join(refused))
    return name


def _reason(name: str, device: torch.device, dtype: torch.dtype, aligned: bool) -> str | None:
    return unfit(name, device, dtype) if aligned else "d_model or an expert's d_ff is no multiple of 16 bytes"


@functools.cache
def unfit(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve; None where it can and agrees with the loop, an empty group included."""
    if name == "megablocks":
        if (missing := megablocks_missing()) is not None:
            return missing
        if dtype != torch.bfloat16:
            return f"has no {str(dtype).removeprefix('torch.')} kernel"
    try:
        return _disagreement(name, device, dtype)
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _disagreement(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    def values(*shape: int) -> Tensor:  # without a generator: a probe must not move anybody's random numbers
        number = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
        return ((number * 0.6180339887498949) % 1.0 - 0.5).view(shape).to(device, dtype)

    ends_E = torch.tensor([16, 16, 40, 64], dtype=torch.int32, device=device)
    x_MK, weight_EKN, dy_MN = values(72, 16), values(4, 16, 32), values(72, 32)
    used = int(ends_E[-1])
    with torch.no_grad():
        for what in ("rows", "turned rows", "matrices"):
            if what == "rows":
                found, truth = (BACKENDS[n].rows(x_MK, weight_EKN, ends_E)[:used] for n in (name, "loop"))
            elif what == "turned rows":
                turned = weight_EKN.transpose(1, 2)
                found, truth = (BACKENDS[n].rows(dy_MN, turned, ends_E)[:used] for n in (name, "loop"))
            else:
                found, truth = (BACKENDS[n].matrices(x_MK, dy_MN, ends_E) for n in (name, "loop"))
            error = (found.double() - truth.double()).abs().max().item()
            # A product of bf16 is rounded once; sums in another order differ by a few ulp.
            allowed = 4 * torch.finfo(dtype).eps * truth.double().abs().max().item()
            if not (found.shape == truth.shape and error <= allowed):
                return f"{what} differ by {error:.1e}"
    return None
