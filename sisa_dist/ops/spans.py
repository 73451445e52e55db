"""How a sequence is cut into spans, and the decay and phase measured on it.

Two ideas of the bisected path live here: the list of levels (which queries meet which keys), and sums that are exact.
log α is rounded to a multiple of 2^-36 nats (2^-42 in fp64) and summed in fp64: sums of such multiples carry no
rounding error at all up to 2^17 (2^11) nats, so a difference of two running sums *is* the sum over the span between
them, whatever lies before. No precision is lost with length, and another document's decay cannot move a single bit of
ours; the rounding itself, 7e-12 (1e-13) nats a token, is far under the exponential's own error. θ is summed in 64-bit
fixed point, where overflow is the reduction mod 2π. What is done with the spans is not decided
here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """`num` pairs of neighbouring spans from token `start` on: `span` keys, then the `rows` queries that see them.

    Of both only what lies within reach of the edge between them counts: the last `last_keys` and `first_rows`.
    """

    start: int
    num: int
    span: int
    rows: int
    last_keys: int | None = None  # None: all
    first_rows: int | None = None

    def odd(self, x_MT: Tensor) -> Tensor:
        """The query side of `[M, T, ...]`: a view `[M, num, first_rows, ...]`."""
        return self._pairs(x_MT)[:, :, self.span :][:, :, : self.first_rows]

    def even(self, x_MT: Tensor) -> Tensor:
        """The key side of `[M, T, ...]`: a view `[M, num, last_keys, ...]`."""
        first = 0 if self.last_keys is None else self.span - self.last_keys
        return self._pairs(x_MT)[:, :, first : self.span]

    def _pairs(self, x_MT: Tensor) -> Tensor:
        length = self.span + self.rows
        return x_MT.narrow(1, self.start, self.num * length).unflatten(1, (self.num, length))


def levels(num_tokens: int, leaf: int) -> Iterator[Level]:
    """Every rectangle of the bisection, small spans first; together with the leaves they tile j ≤ i exactly once.

    A last odd span cut short by the end of the sequence is a level of its own, with one pair and fewer rows.
    """
    span = leaf
    while span < num_tokens:
        full, rest = divmod(num_tokens, 2 * span)
        if full:
            yield Level(0, full, span, span)
        if rest > span:
            yield Level(full * 2 * span, 1, span, rest - span)
        span *= 2


def decay_sums(log_alpha_BGT: Tensor, *, work: torch.dtype) -> Tensor:
    """g: inclusive running sums along T, fp64, of log α rounded to a multiple of the quantum for `work`."""
    grain = 2.0**42 if work == torch.float64 else 2.0**36
    return (log_alpha_BGT.double() * grain).round_().cumsum(2).mul_(1 / grain)


def phase_turns(theta_BGTm: Tensor, first_BT: Tensor | None, *, work: torch.dtype) -> Tensor:
    """Φ in turns, in [−1/2, 1/2]: inclusive running sums along T, counted from token `first_BT` where given.

    The sum is of int64 in units of 2^-44 turn (2^-52 in fp64): it may overflow, for 2^64 units are whole turns. A
    single θ must stay below 2^19 (2^11) turns. One θ repeated a million times is off by 2e-7 radians at most, an fp32
    angle's own rounding. Counting from the document's first token keeps an earlier document's θ
    from moving a bit of the rotated channels.
    """
    units = phase_units(theta_BGTm, work=work)
    if first_BT is not None:
        units = units - units.gather(2, first_BT[:, None, :, None].expand_as(units))
    return as_turns(units, work=work, dtype=work)


def phase_units(theta_BGTm: Tensor, *, work: torch.dtype) -> Tensor:
    """Inclusive running sums of θ along T as int64, in units of 2^-44 turn (2^-52 in fp64)."""
    return (theta_BGTm.double() * (0.5 / math.pi * 2.0 ** _bits(work))).round_().long().cumsum(2)


def as_turns(units: Tensor, *, work: torch.dtype, dtype: torch.dtype) -> Tensor:
    """What `phase_units` counted for `work` as turns in [−1/2, 1/2], exact in fp64; overwrites units."""
    # Shifted so that whole turns fall off the top and the sign bit is half a turn.
    return units.mul_(1 << (64 - _bits(work))).to(dtype).mul_(2.0**-64)


def _bits(work: torch.dtype) -> int:
    return 52 if work == torch.float64 else 44


def turn(turns: Tensor) -> Tensor:
    """e^{2πi·turns}, complex; |turns| ≤ 1/2, or an fp32 cosine loses digits."""
    angle = turns * (2 * math.pi)
    return torch.complex(torch.cos(angle), torch.sin(angle))


def as_complex(x: Tensor) -> Tensor:
    """`[..., d_s]` → complex `[..., d_s/2]`: the pair (2m, 2m+1) is real and imaginary part, so e^{iφ} rotates it."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def as_real(z: Tensor) -> Tensor:
    """Inverse of `as_complex`."""
    return torch.view_as_real(z).flatten(-2)
