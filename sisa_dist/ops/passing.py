"""What a recurrence takes from one stretch of a window into the next, where the stretches were worked on side by side.

A linear recurrence's state behind a stretch is `left + kept · before`: what its own tokens leave in an empty state, and
what they keep of the one before. Neither knows the other stretches, so all are made at once; the states before them are
then a running product and sum over stretches, few and small. No document hands anything to the next.

Stretches stand in front, `[S, B, ...]` in the window's order. Who holds which is not known here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_dist.ops.documents import Segments
from sisa_dist.ops.spans import as_turns, phase_units


def states_before(left: Tensor, kept: Tensor, docs: Tensor | None) -> Tensor:
    """The state before every stretch: 0, then left + kept · before of the one in front of it.

    left `[S, B, ...]`; kept, which broadcasts to it, is 0 where another document begins inside the stretch; docs
    `[S, B, h]`: nothing passes where one begins with it.
    """
    found = [torch.zeros_like(left[0])]
    for stretch in range(len(left) - 1):
        now = left[stretch] + kept[stretch] * found[-1]
        if docs is not None:
            begins_B = docs[stretch, :, -1] != docs[stretch + 1, :, 0]
            now = now.masked_fill(begins_B.view(-1, *(1,) * (now.ndim - 1)), 0.0)
        found.append(now)
    return torch.stack(found)


def same_document(docs: Tensor, count: int) -> Tensor:
    """Bool `[S, B, count]`: which of the `count` tokens before each stretch are of its first token's document.

    docs `[S, B, h]`. Before the window nothing is.
    """
    whole = docs.movedim(0, 1).flatten(1)
    padded = F.pad(whole, (count, 0))
    starts = range(0, whole.shape[1], docs.shape[2])
    before = torch.stack([padded[:, start : start + count] for start in starts])
    inside = torch.stack([torch.arange(start, start + count, device=docs.device) >= count for start in starts])
    return (before == docs[:, :, :1]) & inside[:, None]


def stretch_turns(theta: Tensor, docs: Tensor | None, *, work: torch.dtype) -> Tensor:
    """Φ in turns within each stretch, from its start or the document's first token if later; fp64, exact sums.

    theta `[S, B, G, h, m]` in radians; docs `[S, B, h]` of the same stretches.
    """
    units = phase_units(theta.flatten(0, 1), work=work).view(theta.shape)
    if docs is not None:
        first = Segments.of(docs.flatten(0, 1)).first.view(docs.shape)[:, :, None, :, None]
        before = units.gather(3, (first - 1).clamp(min=0).expand_as(units))
        units = units - before.masked_fill_(first == 0, 0)
    return as_turns(units, work=work, dtype=torch.float64)
