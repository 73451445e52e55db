"""What another family keeps in one tensor and ours in one a kind: cut by rows on the way in, joined on the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from sisa_dist.config import UserError


def cut(theirs: str, rows: Mapping[str, int], part: str) -> Callable[[Tensor], Tensor]:
    """Makes `part` of the fused tensor `theirs`, whose parts have `rows` each and stand in this order.

    A depthwise convolution's [channels, 1, taps] becomes [channels, taps].
    """
    stop = dict(zip(rows, accumulate(rows.values()), strict=True))[part]
    whole = sum(rows.values())

    def make(fused: Tensor) -> Tensor:
        if fused.shape[0] != whole:
            raise UserError(
                f"config.json: the model it describes has {whole} rows in {theirs} and the checkpoint "
                f"{fused.shape[0]}: is this the right config?"
            )
        found = fused[stop - rows[part] : stop]
        return found.squeeze(1) if found.ndim == 3 else found

    return make


def joined(*, convolution: bool = False) -> Callable[..., Tensor]:
    """Makes the fused tensor of its parts."""
    return lambda *parts: torch.cat(parts).unsqueeze(1) if convolution else torch.cat(parts)
