"""Which row each (token, expert) choice has in a table sorted by expert, and the two ways between tokens and rows.

Both ways are gathers in forward and in backward, by the two index tables: no atomics, so the same bits every time.
Nothing is dropped: the table is as long as there are choices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

ALIGN = 8  # rows an expert's group is a multiple of: 16 bytes of bf16, which CUDA's grouped products ask for


class Rows(NamedTuple):
    """A table of M rows: the chosen tokens of each expert in their order, padded, expert after expert.

    What M has beyond `ends_E[-1]`, and the padding, belongs to no token.
    """

    ends_E: Tensor  # int32, where each expert's group ends
    token_M: Tensor  # int64, whose copy a row is; 0 where empty
    choice_M: Tensor  # int64, which of the N · K choices; 0 where empty
    empty_M: Tensor  # bool
    row_NK: Tensor  # int64, the row of each choice; 0 where elsewhere
    elsewhere_NK: Tensor  # bool, its expert is not one of these


@torch.no_grad()
def arrange(expert_NK: Tensor, *, first: int, count: int, total: int, align: int = ALIGN) -> Rows:
    """The table of the experts first..first+count−1, of `total`, for the choices `expert_NK` (int64) of N tokens.

    Groups are padded to `align` rows; 1 will do for a table that is not multiplied. With all experts here M is known
    beforehand; with some of them it is read from the device, which is waited for.
    """
    num_tokens, top_k = expert_NK.shape
    num_choices, device = expert_NK.numel(), expert_NK.device
    local = expert_NK.flatten() - first
    key = torch.where((local >= 0) & (local < count), local, count)
    size_E = torch.zeros(count + 1, dtype=torch.int64, device=device).scatter_add_(0, key, torch.ones_like(key))
    padded_E = (size_E + align - 1) // align * align
    padded_E[count] = 0
    ends_E = padded_E.cumsum(0)
    rows = _num_rows(ends_E[count], num_choices, count=count, total=total, align=align)
    order = key.argsort(stable=True)
    of_E = (ends_E - padded_E) - (size_E.cumsum(0) - size_E)  # from a place in sorted choices to a row
    sorted_key = key[order]
    row = torch.arange(num_choices, device=device) + of_E[sorted_key]
    row = torch.where(sorted_key < count, row, rows)  # what is elsewhere goes behind the table, which is then cut
    choice_M = torch.full((rows + 1,), -1, dtype=torch.int64, device=device)
    choice_M[row] = order
    choice_M = choice_M[:rows]
    empty_M = choice_M < 0
    choice_M = choice_M.clamp(min=0)
    row_of = torch.empty_like(row)
    row_of[order] = row
    elsewhere = row_of == rows
    return Rows(
        ends_E[:count].int(),
        choice_M // top_k,
        choice_M,
        empty_M,
        row_of.masked_fill_(elsewhere, 0).view(num_tokens, top_k),
        elsewhere.view(num_tokens, top_k),
    )


def _num_rows(last_end: Tensor, num_choices: int, *, count: int, total: int, align: int) -> int:
    if isinstance(last_end, FakeTensor):  # a rehearsal: as if all experts were chosen equally often
        return max(align, num_choices * count // total + (align - 1) * count)
    # At least one group of rows: a product may not take an empty table.
    return max(align, num_choices + (align - 1) * count if count == total else int(last_end))


def dispatch(x_ND: Tensor, rows: Rows) -> Tensor:
    """[M, D] of x's dtype: each row the token it is a copy of, or zeros."""
    return _Dispatch.apply(x_ND, rows)


def combine(y_MD: Tensor, weight_NK: Tensor, rows: Rows) -> Tensor:
    """[N, D] of y's dtype: Σ_k weight · row, summed in at least fp32, over the choices that are here."""
    return _Combine.apply(y_MD, weight_NK, rows)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chosen(y_MD: Tensor, rows: Rows, k: int) -> Tensor:
    """[N, D], wide: the row of every token's k-th choice, zeros where that is elsewhere (rows may hold garbage)."""
    picked = y_MD[rows.row_NK[:, k]].to(_wide(y_MD))
    return picked.masked_fill_(rows.elsewhere_NK[:, k, None], 0.0)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x_ND[rows.token_M].masked_fill_(rows.empty_M[:, None], 0.0)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        rows: Rows = ctx.rows
        total = _chosen(grad_MD, rows, 0)
        for k in range(1, rows.row_NK.shape[1]):
            total += _chosen(grad_MD, rows, k)
        return total.to(grad_MD.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weight_NK: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(y_MD, weight_NK)
        ctx.rows = rows
        total = _chosen(y_MD, rows, 0) * weight_NK[:, :1]
        for k in range(1, weight_NK.shape[1]):
            total += _chosen(y_MD, rows, k) * weight_NK[:, k, None]
        return total.to(y_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        y_MD, weight_NK = ctx.saved_tensors
        rows: Rows = ctx.rows
        weight_M1 = weight_NK.flatten()[rows.choice_M].masked_fill_(rows.empty_M, 0.0)[:, None]
        dy_MD = (grad_ND[rows.token_M] * weight_M1).to(y_MD.dtype)
        wide_ND = grad_ND.to(_wide(y_MD))
        columns = [(_chosen(y_MD, rows, k) * wide_ND).sum(-1) for k in range(weight_NK.shape[1])]
        return dy_MD, torch.stack(columns, 1).to(weight_NK.dtype), None
