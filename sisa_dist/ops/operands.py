"""What one bisected call works on: padded, rotated, widened to one width, and re-based level by level.

q̂ = [q ; e^{g_i−c} C̃ ; 1 ; 0…] and k̂ = [k ; e^{c−g_j} B̃ ; mask ; 0…] are written once; from level to level only the
d_s channels (and the mask of documents) are overwritten, since c moves with the level. That is the whole cost of
bisection beside the flash calls: 2·d_s of every d_h + d_s channels a level. Forward and backward build the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.ops.backends import value_width
from sisa_dist.ops.documents import crossing, mask_value, within_reach
from sisa_dist.ops.leaf import Leaves
from sisa_dist.ops.precision import exp_
from sisa_dist.ops.spans import Level, as_complex, levels


class Shape(NamedTuple):
    """Sizes of one call. M = batch·heads, N = batch·kv heads; tokens are padded to a multiple of leaf, zeros last."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    leaf: int
    d_h: int
    d_v: int
    d_s: int
    masked: bool

    @property
    def padded(self) -> int:
        return -(-self.tokens // self.leaf) * self.leaf

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Channels of q̂, k̂ and the padded v; CUDA flash wants a multiple of 8."""
        return -(-max(self.d_h + self.d_s + self.masked, self.d_v) // 8) * 8


class Rectangle(NamedTuple):
    """One level, ready for a backend: q̂ `[M, num, rows, width]`, k̂, v̂ `[N, num, span, width]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    rise: Tensor  # e^{g_i−c} `[M, num, rows, 1]`
    fall: Tensor  # e^{c−g_j} `[N, num, span, 1]`
    outside: Tensor | None  # bool `[M, num, rows]`: queries no document crosses to


class Buffers:
    """q̂, k̂ and v̂ of one call, padded and widened, and how further inputs are brought to their shape."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, shape: Shape, *, backend: str) -> None:
        self.shape = shape
        doc = None if doc_ids is None else self.hold(doc_ids[:, None])
        found = levels(shape.padded, shape.leaf)
        self.levels = list(found if doc is None else within_reach(found, doc))  # small spans first
        self.v_width = self._v_width(q, backend)
        self.q, self.k = (self.spread(x, width=shape.width) for x in (q, k))
        self.v = self.like_v(v)
        self.doc_q = self.doc_k = None
        if doc is not None:
            self.doc_q, self.doc_k = (doc.repeat_interleave(n, 0) for n in (shape.heads, shape.kv_heads))

    def _v_width(self, q: Tensor, backend: str) -> int:
        """Some kernels need v, out and dout as wide as q̂: where none such serves even the largest level, less."""
        shape = self.shape
        largest = max((level.last_keys or level.span for level in self.levels), default=0)
        sizes = {"num_keys": largest, "width": shape.width, "d_v": shape.d_v, "group": shape.group}
        return value_width(q.device, q.dtype, **sizes, backend=backend)

    def like_v(self, x: Tensor) -> Tensor:
        """v, out or dout `[B, H, T, d_v]` → `[B·H, padded, v_width]`, to be read only: no copy where none is needed."""
        if x.is_contiguous() and self.v_width == x.shape[-1] and self.shape.padded == x.shape[2]:
            return x.flatten(0, 1)
        return self.spread(x, width=self.v_width)

    def spread(self, x: Tensor, *, width: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """[B, H, T, w] → [B·H, padded, width], zeros beyond; always a fresh contiguous copy."""
        heads, T, w = x.shape[1:]
        full = x.new_empty(x.shape[0], heads, self.shape.padded, width or w, dtype=dtype)
        full[:, :, :T, :w] = x
        full[:, :, T:] = 0
        full[:, :, :T, w:] = 0
        return full.flatten(0, 1)

    def hold(self, x: Tensor) -> Tensor:
        """[B, H, T] → [B·H, padded], the last value repeated: a padded token decays nothing and joins no document."""
        more = self.shape.padded - self.shape.tokens
        return torch.cat((x, x[..., -1:].expand(*x.shape[:2], more)), dim=-1).flatten(0, 1)

    def in_leaves(self, x: Tensor) -> Tensor:
        """[M, padded, ...] → [M, n, leaf, ...]"""
        return x.unflatten(1, (-1, self.shape.leaf))

    def hidden(self) -> Tensor:
        """Bool, True = not visible, inside the leaves: `[L, L]`, or `[N·n, L, L]` with documents."""
        L = self.shape.leaf
        later = torch.ones(L, L, dtype=torch.bool, device=self.q.device).triu_(1)
        if self.doc_k is None:
            return later
        doc = self.in_leaves(self.doc_k).flatten(0, 1)
        return later | (doc[:, :, None] != doc[:, None, :])


class Operands(Buffers):
    """Buffers of one call; `rectangle(level)` re-bases them in place, so use one rectangle before asking the next."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        C: Tensor,
        B: Tensor,
        g: Tensor,
        turn_BGTm: Tensor,
        lam_over_scale: Tensor,
        doc_ids: Tensor | None,
        shape: Shape,
        *,
        scale: float,
        backend: str,
        erase: bool = False,
    ) -> None:
        """q … B as in `sisa_attention`; g `[B, H_kv, T]` fp64, turn `[B, H_kv, T, d_s/2]` complex, lam/scale `[H]`.

        `erase`: of another document's keys and rows a level leaves zeros, for scores between documents that may
        outweigh the mask's value. What a level hides no later one shows, since its spans end later.
        """
        super().__init__(q, k, v, doc_ids, shape, backend=backend)
        self.erase = erase
        d_h, d_s, work = shape.d_h, shape.d_s, turn_BGTm.real.dtype
        self.g = self.hold(g)
        self.C, self.B = self.spread(C, dtype=work), self.spread(B, dtype=work)
        if d_s:
            turned_C = as_complex(self.C.view(shape.batch, shape.kv_heads, shape.group, shape.padded, d_s))
            turned_B = as_complex(self.B.view(shape.batch, shape.kv_heads, shape.padded, d_s))
            turned_C.narrow(3, 0, shape.tokens).mul_(turn_BGTm[:, :, None])
            turned_B.narrow(2, 0, shape.tokens).mul_(turn_BGTm)
            self.C.view(shape.batch, shape.heads, -1).mul_(lam_over_scale[:, None])
        self.ssm = slice(d_h, d_h + d_s)
        if doc_ids is not None:
            self.mask = d_h + d_s
            self.mask_value = mask_value(scale, q.dtype)
            self.q[..., self.mask] = 1

    def leaves(self) -> Leaves:
        """The diagonal blocks, each with the mask inside it."""
        d_h, d_v = self.shape.d_h, self.shape.d_v
        q, k, v = self.q[..., :d_h], self.k[..., :d_h], self.v[..., :d_v]
        q, k, v, C, B, g = (self.in_leaves(x) for x in (q, k, v, self.C, self.B, self.g))
        return Leaves(q, k, v, C, B, g, self.hidden())

    def rectangle(self, level: Level) -> Rectangle:
        """The level re-based to its even spans' ends, where both factors are ≤ 1 and underflow to 0 is right."""
        odd_q, even_k = level.odd(self.q), level.even(self.k)
        end = level.even(self.g)[:, :, -1:]
        rise = exp_((level.odd(self.g) - end).to(self.C.dtype))[..., None]
        fall = exp_((end - level.even(self.g)).to(self.C.dtype))[..., None]
        if self.shape.group > 1:
            rise = rise.repeat_interleave(self.shape.group, 0)
        if self.shape.d_s:
            _scale_into(odd_q[..., self.ssm], level.odd(self.C), rise)
            _scale_into(even_k[..., self.ssm], level.even(self.B), fall)
        outside = None
        if self.doc_q is not None and self.doc_k is not None:
            across = crossing(self.doc_q, self.doc_k, level)
            outside = ~across.rows
            if self.erase:
                odd_q.masked_fill_(outside[..., None], 0)
                even_k.masked_fill_(~across.keys[..., None], 0)
            even_k[..., self.mask] = torch.where(across.keys, 0.0, self.mask_value).to(even_k.dtype)
        return Rectangle(odd_q, even_k, level.even(self.v), rise, fall, outside)


def _scale_into(target: Tensor, x: Tensor, factor: Tensor) -> None:
    if target.dtype == x.dtype:
        torch.mul(x, factor, out=target)
    else:
        target.copy_(x * factor)
