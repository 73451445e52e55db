"""Generation with a cache: append a chunk's keys, attend everything cached.

One object serves one layer. Chunks may have any length (a prompt, one token, several drafted tokens). The cache keeps
B already rotated and the running decay g *un-exponentiated* in fp64, so a query multiplies λ e^{g_i−g_j} ≤ 1 after
the dot product: with one fixed reference, as in the one-call form, long generation overflows. No gradients here.

A cache may hold packed documents (prompts of several lengths, filled up on the left by a document of their own): then
each chunk brings the doc_ids of its tokens, and only keys of a query's own document are visible to it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.attention import causal_attention
from sisa_dist.ops.masks import causal_mask, document_mask
from sisa_dist.ops.precision import no_autocast, work_dtype
from sisa_dist.ops.rotation import expand_kv, phase_cos_sin, rotate, running_sum
from sisa_dist.ops.score import sisa_attention

# Queries scored at once against the cache: bounds the explicit [.., rows, length] scores of a long chunk.
ROWS = 256


class GrowingBuffer:
    """Append along dim 2 at amortised constant cost: capacity doubles, so n tokens cost O(n) copies in all."""

    def __init__(self) -> None:
        self.length = 0
        self._store: Tensor | None = None

    def append(self, x: Tensor) -> Tensor:
        """Append `[B, H, t, ...]`; returns a view of everything held, `[B, H, length, ...]`."""
        needed, store = self.length + x.shape[2], self._store
        if store is not None and (store.shape[:2] != x.shape[:2] or store.shape[3:] != x.shape[3:]):
            raise UserError(
                f"cache: a chunk {tuple(x.shape)} does not continue {tuple(store.shape)}: start a new cache"
            )
        if store is None or needed > store.shape[2]:
            grown = x.new_empty(*x.shape[:2], max(needed, 2 * self.length), *x.shape[3:])
            if store is not None:
                grown[:, :, : self.length] = store[:, :, : self.length]
            store = self._store = grown
        store[:, :, self.length : needed] = x
        self.length = needed
        return store[:, :, :needed]


class _Cache:
    """Keys and values of one layer, and the documents they belong to, if any."""

    def __init__(self) -> None:
        self._k, self._v = GrowingBuffer(), GrowingBuffer()
        self._doc_ids_BT: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._k.length

    def documents(self, doc_ids_Bt: Tensor | None) -> Tensor | None:
        """doc_ids `[B, length + t]` of the tokens held and of a chunk of t that is to come; None without documents.

        Raises UserError where the one have doc_ids and the other none.
        """
        if self.length and (self._doc_ids_BT is None) != (doc_ids_Bt is None):
            raise UserError("cache: doc_ids go with every chunk or with none: start a new cache")
        if self._doc_ids_BT is None or doc_ids_Bt is None:
            return doc_ids_Bt
        return torch.cat((self._doc_ids_BT, doc_ids_Bt), dim=1)


class AttentionCache(_Cache):
    """Keys and values of one plain attention layer."""

    @torch.no_grad()
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        """Append k `[B, H_kv, t, d]`, v `[B, H_kv, t, d_v]`; attend q `[B, H, t, d]` to all cached tokens, causally.

        `doc_ids` `[B, t]` go on from those of the tokens held. Returns `[B, H, t, d_v]` in q's dtype: what
        `causal_attention` gives for the last t tokens of the full run.
        """
        t = q.shape[2]
        first = self.length == 0
        held_ids = self._doc_ids_BT = self.documents(doc_ids)
        k_all, v_all = self._k.append(k), self._v.append(v)
        if first:
            return causal_attention(q, k, v, scale=scale, doc_ids=doc_ids)
        mask = None if t == 1 else causal_mask(t, self.length, device=q.device)
        if held_ids is not None:
            mask = document_mask(held_ids, t)
        with no_autocast(q.device):
            return F.scaled_dot_product_attention(
                q, k_all, v_all, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )


class SisaCache(_Cache):
    """Keys, values, rotated B and running decay of one SISA layer."""

    def __init__(self) -> None:
        super().__init__()
        self._B, self._g = GrowingBuffer(), GrowingBuffer()
        self._last: tuple[Tensor, Tensor] | None = None  # g and Φ mod 2π after the last token, fp64

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        C: Tensor,
        B: Tensor,
        log_alpha: Tensor,
        theta: Tensor,
        lam: Tensor,
        *,
        scale: float | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        """Append one chunk of t tokens and attend its queries to everything cached.

        Shapes are those of `sisa_attention` with t in place of T; `doc_ids` `[B, t]` go on from those of the tokens
        held. Returns `[B, H, t, d_v]` in q's dtype: what `sisa_attention` gives for the last t tokens of the full run.
        """
        H, t = q.shape[1], q.shape[2]
        work = work_dtype(q.dtype)
        first = self.length == 0
        held_ids = self._doc_ids_BT = self.documents(doc_ids)
        g_BGt, phase_BGtm = running_sum(log_alpha, dim=-1), running_sum(theta, dim=-2)
        if self._last is not None:
            g_BGt = g_BGt + self._last[0]
            phase_BGtm = phase_BGtm + self._last[1]
        phase_BGtm = torch.remainder(phase_BGtm, 2 * math.pi)
        cos, sin = phase_cos_sin(phase_BGtm, dtype=work)
        k_all, v_all = self._k.append(k), self._v.append(v)
        B_all = self._B.append(rotate(B.to(work), cos, sin).to(B.dtype))
        g_all = self._g.append(g_BGt)
        self._last = g_BGt[:, :, -1:].clone(), phase_BGtm[:, :, -1:].clone()
        if first:
            return sisa_attention(q, k, v, C, B, log_alpha, theta, lam, scale=scale, doc_ids=doc_ids)

        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with no_autocast(q.device):
            C_rot = rotate(C.to(work), expand_kv(cos, H), expand_kv(sin, H)) * lam.to(work)[:, None, None]
            rows = []
            for i in range(0, t, ROWS):
                seen = self.length - t + min(i + ROWS, t)
                queries = q[:, :, i : i + ROWS].to(work), C_rot[:, :, i : i + ROWS], g_BGt[:, :, i : i + ROWS]
                keys = (x[:, :, :seen] for x in (k_all, v_all, B_all, g_all))
                ids = None if held_ids is None else held_ids[:, :seen]
                rows.append(_attend_rows(*queries, *keys, scale=scale, doc_ids_Bn=ids))
        return torch.cat(rows, dim=2).to(q.dtype)


def _attend_rows(
    q_BHrd: Tensor,
    C_BHrs: Tensor,
    g_BGr: Tensor,
    k_BGnd: Tensor,
    v_BGnv: Tensor,
    B_BGns: Tensor,
    g_BGn: Tensor,
    *,
    scale: float,
    doc_ids_Bn: Tensor | None,
) -> Tensor:
    """Softmax over n keys of the last r of them as queries; every head of a group shares its keys without a copy."""
    batch, H, r, _ = q_BHrd.shape
    G, n, work = k_BGnd.shape[1], k_BGnd.shape[2], q_BHrd.dtype
    q, C = (x.reshape(batch, G, H // G * r, -1) for x in (q_BHrd, C_BHrs))
    decay_BGrn = (g_BGr[..., :, None] - g_BGn[..., None, :]).clamp(max=0.0).to(work).exp()
    score = ((C @ B_BGns.to(work).mT).unflatten(2, (-1, r)) * decay_BGrn[:, :, None]).flatten(2, 3)
    score = score + (q @ k_BGnd.to(work).mT) * scale
    if r > 1 or doc_ids_Bn is not None:
        visible = causal_mask(r, n, device=q.device) if doc_ids_Bn is None else document_mask(doc_ids_Bn, r)[:, :, None]
        score = score.unflatten(2, (-1, r)).masked_fill(~visible, float("-inf")).flatten(2, 3)
    return (score.softmax(-1) @ v_BGnv.to(work)).reshape(batch, H, r, -1)
