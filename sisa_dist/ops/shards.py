"""The score of a window whose stretches lie on several processes: keys made ready to be sent, met, and merged.

A window is cut into 2·R stretches for R processes; each holds an early and a late one. On the diagonal a stretch is an
ordinary bisected call. Every other pair of them is a rectangle, an even span and an odd one of the bisection that need
not be neighbours: keys are re-based to their own stretch's end, e^{end − g_j} ≤ 1, before they are sent, and so do not
depend on who will read them. Queries are measured from their own stretch's start; what lies between is one number of
decay and d_s/2 phases a head, the `link`. All three factors are ≤ 1, so nothing overflows and underflow to 0 is right.

Phases are counted within a stretch, and there from the first token of the document, which keeps another document's θ
from moving a bit of ours. What is sent, and in which order, is not decided here (parallel/context_score.py).

Layout: the two stretches stand in front, `[2, B, H, h, ·]`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_dist.ops.backends import Gradients, Rows, attend, attend_backward, value_width
from sisa_dist.ops.bisect import EXCLUDED, turned_back
from sisa_dist.ops.documents import Segments, mask_value
from sisa_dist.ops.passing import stretch_turns
from sisa_dist.ops.precision import exp_, work_dtype
from sisa_dist.ops.spans import as_complex, as_real, turn


class Inputs(NamedTuple):
    """As `sisa_attention`'s, with two stretches in front; lam `[H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    C: Tensor
    B: Tensor
    lam: Tensor


class Frames(NamedTuple):
    """Decay and phase of each stretch, measured inside it."""

    rise: Tensor  # e^{g_i − start} `[2, B, G, h]`
    fall: Tensor  # e^{end − g_j} `[2, B, G, h]`
    unit: Tensor  # e^{iΦ} `[2, B, G, h, d_s/2]`, Φ from the stretch's start, or the document's first token if later
    totals: Tensor  # fp64 `[2, B, G, 1 + d_s/2]`: log α of the stretch; Φ at its end, in turns


def stretches(x_BHT: Tensor) -> Tensor:
    """[B, H, 2h, ...] → [2, B, H, h, ...], contiguous."""
    return x_BHT.unflatten(2, (2, -1)).movedim(2, 0).contiguous()


def joined(x_2BHh: Tensor) -> Tensor:
    """Inverse of `stretches`."""
    return x_2BHh.movedim(0, 2).flatten(2, 3)


def frames(g: Tensor, theta: Tensor, doc_ids: Tensor | None, *, work: torch.dtype) -> Frames:
    """g `[2, B, G, h]`, fp64 running sums within the stretch; theta `[2, B, G, h, m]`; doc_ids `[2, B, h]`."""
    end = g[..., -1:]
    turns = stretch_turns(theta, doc_ids, work=work)
    totals = torch.cat((end, turns[..., -1, :]), -1)
    return Frames(exp_(g.to(work, copy=True)), exp_((end - g).to(work)), turn(turns.to(work)), totals)


def link(totals: Tensor, query: int, key: int, *, work: torch.dtype) -> Tensor:
    """What stands between the start of stretch `query` and the frame of keys of the earlier stretch `key`.

    totals `[2R, B, G, 1 + m]` of all stretches in order → complex `[B, G, 1, m]`, of modulus ≤ 1.
    """
    decay, turns = totals[key + 1 : query, ..., :1].sum(0), totals[key:query, ..., 1:].sum(0)
    return (turn((turns - turns.round()).to(work)) * exp_(decay.to(work, copy=True)))[:, :, None]


class Meeting:
    """This process's two stretches as queries, and how they meet others' keys; made alike for forward and backward."""

    def __init__(
        self,
        x: Inputs,
        at: Frames,
        own_docs: Tensor | None,
        docs: Tensor | None,
        *,
        scale: float,
        backend: str,
    ) -> None:
        """own_docs `[2, B, h]` of the two stretches; docs `[2R, B, h]` of all."""
        self.x, self.at, self.own_docs, self.docs = x, at, own_docs, docs
        self.scale, self.backend, self.dtype = scale, backend, x.q.dtype
        self.work = work_dtype(self.dtype)
        _, self.batch, self.heads, self.h, self.d_h = x.q.shape
        self.kv_heads, self.d_s, self.d_v = x.k.shape[2], x.C.shape[-1], x.v.shape[-1]
        self.group = self.heads // self.kv_heads
        used = self.d_h + self.d_s + (docs is not None)
        self.width = -(-max(used, self.d_v) // 8) * 8  # CUDA flash wants a multiple of 8
        sizes = {"num_keys": self.h, "width": self.width, "d_v": self.d_v, "group": self.group}
        self.v_width = value_width(x.q.device, self.dtype, **sizes, backend=backend)
        self.ssm = slice(self.d_h, self.d_h + self.d_s)
        self.q = F.pad(x.q, (0, self.width - self.d_h))
        if docs is not None:
            self.q[..., self.d_h + self.d_s] = 1
        self.C = self._turned_C()

    def _turned_C(self) -> Tensor:
        """(λ/scale) e^{rise} R(Φ) C, complex `[2, B, G, group, h, m]`."""
        C = as_complex(self.x.C.to(self.work).contiguous()) * (self.x.lam.to(self.work) / self.scale)[:, None, None]
        return C.unflatten(2, (-1, self.group)) * (self.at.unit * self.at.rise[..., None])[:, :, :, None]

    def sent(self) -> Tensor:
        """[k ; e^{fall} R(Φ) B ; v], what others need of this process's keys: `[2, B, G, h, d_h + d_s + d_v]`."""
        turned = as_complex(self.x.B.to(self.work).contiguous()) * (self.at.unit * self.at.fall[..., None])
        return torch.cat((self.x.k, as_real(turned).to(self.dtype), self.x.v), -1)

    def meet(self, a: int, shard: Tensor, key: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of own stretch `a` against stretch `key`, a `[B, G, h, ·]` of `sent`; z their `link`.

        Returns out `[B, H, h, d_v]` and lse `[B, H, h]`, −inf in rows that no document crosses to.
        """
        q, k, v = self._operands(a, shard, key, z)
        out, lse = attend(q, k, v, d_v=self.d_v, scale=self.scale, backend=self.backend)
        out, lse = self._by_head(out[..., : self.d_v]).to(self.work), self._by_head(lse).to(self.work)
        outside = self._outside(a, key)
        return out, lse if outside is None else lse.masked_fill(outside, float("-inf"))

    def meet_backward(self, a: int, shard: Tensor, key: int, z: Tensor, rows: Rows, dq: Tensor, dC: Tensor) -> Tensor:
        """From the rows' whole softmax (`like_v`'s dout and out) to the gradient of the shard, `[B, G, h, ·]`.

        Adds to dq `[B, H, h, d_h]` and, as complex pairs, to dC `[B, G, group, h, m]`, the gradient of `_turned_C`.
        """
        q, k, v = self._operands(a, shard, key, z)
        outside = self._outside(a, key)
        lse = rows.lse if outside is None else rows.lse.masked_fill(outside, EXCLUDED)
        flat = (x.flatten(0, 1)[:, None] for x in (rows.dout, rows.out, lse, rows.delta))
        far = attend_backward(Rows(*flat), q, k, v, d_v=self.d_v, scale=self.scale, backend=self.backend)
        far = Gradients(*(self._by_head(x).to(self.work) for x in far))
        dq += far.q[..., : self.d_h]
        dturned = as_complex(far.q[..., self.ssm].contiguous()).unflatten(1, (-1, self.group))
        dC += dturned * z[:, :, None].conj_physical()
        return torch.cat((far.k[..., : self.d_h + self.d_s], far.v[..., : self.d_v]), -1)

    def like_v(self, x: Tensor) -> Tensor:
        """out or dout, as wide as the kernel wants."""
        return F.pad(x, (0, self.v_width - self.d_v)).contiguous()

    def back(self, dC: Tensor, dsent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From the gradients of `_turned_C` and of `sent` to those of k, v, C, B, g, Φ and λ."""
        dk, dB, dv = dsent.split((self.d_h, self.d_s, self.d_v), -1)
        rise = self.at.rise[..., None]
        dC_real = as_real(dC * rise[:, :, :, None]).flatten(2, 3).flatten(0, 1)
        flat = (self.x.C.to(self.work), self.x.B.to(self.work), self.at.unit)
        C, B, unit = (x.flatten(0, 1) for x in flat)
        dB = (dB * self.at.fall[..., None]).flatten(0, 1)
        found = turned_back(dC_real, dB, C, B, unit, self.x.lam.to(self.work), scale=self.scale)
        dC, dB, dg, dphase = (x.unflatten(0, (2, -1)) for x in found[:4])
        return dk, dv, dC, dB, dg, dphase, found[4]

    def _operands(self, a: int, shard: Tensor, key: int, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q[a]
        q[..., self.ssm] = as_real(self.C[a] * z[:, :, None]).flatten(1, 2).to(self.dtype)
        k = F.pad(shard[..., : self.d_h + self.d_s], (0, self.width - self.d_h - self.d_s))
        if self.docs is not None:
            seen = self.docs[key] == self.docs[key][:, -1:]
            mask = torch.where(seen, 0.0, mask_value(self.scale, self.dtype)).to(self.dtype)
            k[..., self.d_h + self.d_s] = mask[:, None]
        v = F.pad(shard[..., -self.d_v :], (0, self.v_width - self.d_v))
        return q.flatten(0, 1)[:, None], k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None]

    def _outside(self, a: int, key: int) -> Tensor | None:
        """Bool `[B, 1, h]`: queries of another document than the last of the keys' stretch."""
        if self.docs is None or self.own_docs is None:
            return None
        return (self.own_docs[a] != self.docs[key][:, -1:])[:, None]

    def _by_head(self, x: Tensor) -> Tensor:
        """[B·H, 1, h, ...] → [B, H, h, ...]"""
        return x[:, 0].unflatten(0, (self.batch, -1))


def merge_(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor) -> None:
    """Two parts of one softmax by log-sum-exp, into the first."""
    out.lerp_(far_out, torch.sigmoid(far_lse - lse)[..., None])
    lse.copy_(torch.logaddexp(lse, far_lse))


def first_sums(x: Tensor, doc_ids: Tensor | None) -> Tensor:
    """fp64 `[2, B, G, ·]`: x `[2, B, G, h, ·]` summed over each stretch's first document, all of it without."""
    if doc_ids is None:
        return x.sum(3, dtype=torch.float64)
    first = (doc_ids == doc_ids[..., :1])[:, :, None, :, None]
    return torch.where(first, x, 0.0).sum(3, dtype=torch.float64)


def sums_beyond(sums: Tensor, docs: Tensor | None, mine: tuple[int, int]) -> Tensor:
    """Of `first_sums` of all stretches `[2R, B, G, ·]`, those after each of mine that belong to its last document."""
    found = []
    for own in mine:
        later = sums[own + 1 :]
        if docs is not None:
            goes_on = docs[own + 1 :, :, 0] == docs[own, :, -1]
            later = torch.where(goes_on[:, :, None, None], later, 0.0)
        found.append(later.sum(0))
    return torch.stack(found)


def document_starts(docs: Tensor | None, like: Tensor) -> Tensor:
    """Bool `[2R, B, h]`: the first token of each document; without docs of the window, `like` being `[2R, B, h]`."""
    ids = (torch.zeros_like(like, dtype=torch.int8) if docs is None else docs).movedim(0, 1)
    flat = ids.flatten(1)
    edges = torch.cat((torch.ones_like(flat[:, :1], dtype=torch.bool), flat[:, 1:] != flat[:, :-1]), 1)
    return edges.view(ids.shape).movedim(1, 0)


def suffix_sums_from(x: Tensor, beyond: Tensor, doc_ids: Tensor | None, is_first: Tensor) -> Tensor:
    """Σ over what follows in the same document, in the stretch and beyond it; exactly 0 at a document's first token.

    x `[2, B, G, h, ·]`; beyond `[2, B, G, ·]`; is_first bool `[2, B, h]`. As `documents.suffix_sums`, which says why.
    """
    prefix = x.cumsum(3, dtype=torch.float64)
    total, beyond = prefix[..., -1:, :], beyond[..., None, :]
    if doc_ids is not None:
        last = Segments.of(doc_ids.flatten(0, 1)).last.view(doc_ids.shape)
        total = prefix.gather(3, last[:, :, None, :, None].expand_as(prefix))
        goes_on = (doc_ids == doc_ids[..., -1:])[:, :, None, :, None]
        beyond = torch.where(goes_on, beyond, 0.0)
    return (total - prefix).add_(x).add_(beyond).masked_fill_(is_first[:, :, None, :, None], 0)
