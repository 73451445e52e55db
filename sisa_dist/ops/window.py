"""Causal attention to the last `window` tokens and to the first `sinks` tokens of the document, which stay visible.

    j visible to i  ⇔  j ≤ i, of one document, and (i − j < window or j among the document's first `sinks`)

(Beltagy et al. 2020; Xiao et al. 2023, the sinks; Hymba's meta tokens are such.) In blocks of `window` queries, each of
which meets its own block of keys, the block before it, and the sinks of the one document that began earlier still: all
others lie in those two blocks. So there is a mask of T · (2 · window + sinks) entries, never one of T². Keys and values
are copied about twice for it. No positions are added here: RoPE is the caller's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.attention import causal_attention
from sisa_dist.ops.decode import GrowingBuffer
from sisa_dist.ops.documents import Segments, held_and_coming
from sisa_dist.ops.precision import no_autocast

# Queries scored at once against the cache: bounds the mask of a long chunk.
ROWS = 256


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    doc_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention above, scores scaled by 1/√d.

    q `[B, H, T, d]`, k `[B, H_kv, T, d]`, v `[B, H_kv, T, d_v]`, H_kv divides H. `doc_ids` `[B, T]`, non-decreasing.
    `backend` is that of `causal_attention`, which serves T ≤ window; longer ones go by SDPA with a mask. Returns
    `[B, H, T, d_v]` in q's dtype. Raises UserError for shapes that do not fit.
    """
    T = q.shape[2]
    if window >= T:
        return causal_attention(q, k, v, doc_ids=doc_ids, backend=backend)
    if q.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3] or q.shape[1] % k.shape[1]:
        raise UserError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    doc_BT = q.new_zeros(q.shape[0], T, dtype=torch.long) if doc_ids is None else doc_ids
    place_BnK, valid_BnK, doc_BnK, first_BnK = _keys(doc_BT, window, sinks)
    missing = -T % window
    query = torch.arange(T + missing, device=q.device).view(-1, window)
    doc_q = F.pad(doc_BT, (0, missing), mode="replicate").unflatten(1, (-1, window))
    near = query[:, :, None] - place_BnK[:, :, None] < window
    visible = (place_BnK[:, :, None] <= query[:, :, None]) & (near | (place_BnK - first_BnK < sinks)[:, :, None])
    visible &= valid_BnK[:, :, None] & (doc_q[..., None] == doc_BnK[:, :, None])

    def blocks(x_BHTd: Tensor) -> Tensor:
        """[B, H, T, d] → [B · n, H, K, d], the keys of each block."""
        index = place_BnK.clamp(0, T - 1).flatten(1)[:, None, :, None]
        picked = x_BHTd.gather(2, index.expand(-1, x_BHTd.shape[1], -1, x_BHTd.shape[3]))
        return picked.unflatten(2, place_BnK.shape[1:]).transpose(1, 2).flatten(0, 1)

    q_blocks = F.pad(q, (0, 0, 0, missing)).unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
    y = _masked(q_blocks, blocks(k), blocks(v), visible.flatten(0, 1)[:, None])
    return y.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def _keys(doc_BT: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the keys each block meets, [B, n, sinks + 2 · window]: place, whether it counts, document, its first token."""
    T = doc_BT.shape[1]
    token = torch.arange(T, device=doc_BT.device)
    starts = F.pad(doc_BT[:, 1:] != doc_BT[:, :-1], (1, 0), value=True)
    first_BT = torch.where(starts, token, 0).cummax(1).values
    block = torch.arange(-(-T // window), device=doc_BT.device) * window
    local = block[:, None] - window + torch.arange(2 * window, device=doc_BT.device)
    local_BnK = local.expand(len(doc_BT), -1, -1)
    # The document that reaches into the earlier of the two blocks; its sinks count where they lie before that.
    edge = (block - window).clamp(min=0)
    far_BnK = first_BT[:, edge][..., None] + torch.arange(sinks, device=doc_BT.device)
    place = torch.cat((far_BnK, local_BnK), dim=-1)
    valid = torch.cat((far_BnK < edge[:, None], ((local >= 0) & (local < T)).expand_as(local_BnK)), dim=-1)
    row = place.clamp(0, T - 1).flatten(1)
    return place, valid, doc_BT.gather(1, row).view_as(place), first_BT.gather(1, row).view_as(place)


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One SDPA call; q, k and v are zero-padded to one width, which is all the CPU's flash kernel takes."""
    d_v, width, scale = v.shape[-1], max(q.shape[-1], v.shape[-1]), q.shape[-1] ** -0.5
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    with no_autocast(q.device):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y[..., :d_v]


class WindowCache:
    """Keys and values of the sinks and of the last `window` − 1 tokens: of one size, however long the text.

    With packed documents, whose sinks lie elsewhere in every row, it keeps all.
    """

    def __init__(self, *, window: int, sinks: int) -> None:
        self.length = 0
        self._window, self._sinks = window, sinks
        self._doc_ids_BT: Tensor | None = None
        self._k, self._v = GrowingBuffer(), GrowingBuffer()  # with documents only
        self._first: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def documents(self, doc_ids_Bt: Tensor | None) -> Tensor | None:
        """As `held_and_coming` has it."""
        return held_and_coming(self._doc_ids_BT, doc_ids_Bt, length=self.length)

    @torch.no_grad()
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, doc_ids: Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """Append a chunk of t tokens; what `window_attention` gives for the last t tokens of the full run."""
        self._doc_ids_BT = self.documents(doc_ids)
        if self._doc_ids_BT is not None:
            return self._attend_documents(q, k, v, self._doc_ids_BT, backend=backend)
        if self._first is None or self._last is None:
            self.length = k.shape[2]
            self._keep((k, v), (k, v))
            return window_attention(q, k, v, window=self._window, sinks=self._sinks, backend=backend)
        rows = zip(*(x.split(ROWS, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend_rows(*parts) for parts in rows], dim=2)

    def _attend_documents(self, q: Tensor, k: Tensor, v: Tensor, held_ids: Tensor, *, backend: str) -> Tensor:
        before = self.length
        self.length += k.shape[2]
        k_all, v_all = self._k.append(k), self._v.append(v)
        if not before:
            options = {"window": self._window, "sinks": self._sinks, "doc_ids": held_ids}
            return window_attention(q, k, v, backend=backend, **options)  # type: ignore[arg-type]
        place, first = torch.arange(self.length, device=q.device), Segments.of(held_ids).first
        rows = []
        for i in range(before, self.length, ROWS):
            query, n = place[i : i + ROWS, None], min(i + ROWS, self.length)
            near = (place[:n] <= query) & (query - place[:n] < self._window)
            sink = (place[:n] <= query) & (place[:n] - first[:, None, :n] < self._sinks)
            visible = (near | sink) & (held_ids[:, i : i + ROWS, None] == held_ids[:, None, :n])
            rows.append(_masked(q[:, :, i - before : n - before], k_all[:, :, :n], v_all[:, :, :n], visible[:, None]))
        return torch.cat(rows, dim=2)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self._first is not None and self._last is not None
        start = self.length - self._last[0].shape[2]  # of what is still there
        far = min(start, self._first[0].shape[2])
        (first_k, first_v), (last_k, last_v) = self._first, self._last
        if len(k) != len(last_k):
            raise UserError(f"cache: a chunk of {len(k)} rows does not continue {len(last_k)}: start a new cache")
        recent_k, recent_v = torch.cat((last_k, k), dim=2), torch.cat((last_v, v), dim=2)
        keys, values = torch.cat((first_k[:, :, :far], recent_k), 2), torch.cat((first_v[:, :, :far], recent_v), 2)
        token = torch.arange(self.length + k.shape[2], device=q.device)
        place, query = torch.cat((token[:far], token[start:])), token[self.length :, None]
        visible = (place <= query) & ((query - place < self._window) | (place < self._sinks))
        y = _masked(q, keys, values, visible)
        self.length += k.shape[2]
        self._keep((torch.cat((first_k, k), 2), torch.cat((first_v, v), 2)), (recent_k, recent_v))
        return y

    def _keep(self, begin: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> None:
        """The first `sinks` of `begin`, the last window − 1 of `end`. Copies: a view would hold on to the whole."""
        behind = max(0, end[0].shape[2] - (self._window - 1))
        self._first = begin[0][:, :, : self._sinks].clone(), begin[1][:, :, : self._sinks].clone()
        self._last = end[0][:, :, behind:].clone(), end[1][:, :, behind:].clone()
