"""The kernels of grouped products: PyTorch's own, megablocks' (its grouped GEMM), and a loop over the experts.

The loop is what the others are held against, and the last resort: it runs on any device, in any dtype, and waits for
the device to learn the groups. megablocks is imported only when asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MEGABLOCKS = "megablocks.grouped_gemm_util"
_REMEDY = "megablocks is not usable: pip install 'megablocks[gg]'"


class RowsProduct(Protocol):
    """x [M, K], weight [E, K, N] of one dtype (weight perhaps transposed), ends [E] int32 → [M, N]."""

    def __call__(self, x_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor: ...


class MatricesProduct(Protocol):
    """x [M, K], dy [M, N], ends [E] int32 → [E, K, N]: xᵀ·dy of each group, zeros for an empty one."""

    def __call__(self, x_MK: Tensor, dy_MN: Tensor, ends_E: Tensor) -> Tensor: ...


class Backend(NamedTuple):
    rows: RowsProduct
    matrices: MatricesProduct


def _groups(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _loop_rows(x_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    y_MN = x_MK.new_zeros(x_MK.shape[0], weight_EKN.shape[2])
    for expert, group in enumerate(_groups(ends_E)):
        torch.mm(x_MK[group], weight_EKN[expert], out=y_MN[group])
    return y_MN


def _loop_matrices(x_MK: Tensor, dy_MN: Tensor, ends_E: Tensor) -> Tensor:
    products = [x_MK[group].t() @ dy_MN[group] for group in _groups(ends_E)]
    return torch.stack(products)


def _torch_rows(x_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    return torch._grouped_mm(x_MK, weight_EKN, offs=ends_E)


def _torch_matrices(x_MK: Tensor, dy_MN: Tensor, ends_E: Tensor) -> Tensor:
    product_EKN = torch._grouped_mm(x_MK.t(), dy_MN, offs=ends_E)
    if x_MK.device.type == "cpu":
        return product_EKN
    # A kernel may leave the memory of an empty group as it found it.
    size_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    return product_EKN.masked_fill_((size_E == 0)[:, None, None], 0.0)


def _gmm() -> Any:
    return importlib.import_module(MEGABLOCKS).backend.gmm


def _sizes(ends_E: Tensor) -> Tensor:
    """On the host, as megablocks takes them: it waits for the device."""
    return ends_E.long().diff(prepend=ends_E.new_zeros(1, dtype=torch.int64)).cpu()


def _megablocks_rows(x_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    turned = not weight_EKN.is_contiguous()
    stored = weight_EKN.transpose(1, 2) if turned else weight_EKN
    used = int(ends_E[-1])  # it takes rows for as many as the groups have
    y_MN = x_MK.new_zeros(x_MK.shape[0], weight_EKN.shape[2])
    if used:
        y_MN[:used] = _gmm()(x_MK[:used].contiguous(), stored.contiguous(), _sizes(ends_E), trans_b=turned)
    return y_MN


def _megablocks_matrices(x_MK: Tensor, dy_MN: Tensor, ends_E: Tensor) -> Tensor:
    used, sizes = int(ends_E[-1]), _sizes(ends_E)
    if not used:
        return x_MK.new_zeros(len(sizes), x_MK.shape[1], dy_MN.shape[1])
    product_EKN = _gmm()(x_MK[:used].contiguous(), dy_MN[:used].contiguous(), sizes, trans_a=True)
    return product_EKN.masked_fill_((sizes == 0).to(product_EKN.device)[:, None, None], 0.0)


@functools.cache
def megablocks_missing() -> str | None:
    """Why megablocks' grouped GEMM cannot be called here, with what to install; None where it can."""
    try:
        module = importlib.import_module(MEGABLOCKS)
    except Exception as error:  # absent, built against another torch, or without its own dependencies
        return f"{_REMEDY} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None if getattr(module, "backend", None) is not None else f"{_REMEDY} (it came without grouped_gemm)"


BACKENDS: dict[str, Backend] = {
    "loop": Backend(_loop_rows, _loop_matrices),
    "torch": Backend(_torch_rows, _torch_matrices),
    "megablocks": Backend(_megablocks_rows, _megablocks_matrices),
}
