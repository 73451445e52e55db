"""Meta tokens: learned tokens in front of every document, which pass through all layers as any others (Dong et al.
2024, arXiv 2411.13676, section 2.3).

They are ids behind the vocabulary, rows of the embedding that a model has for its padding anyway, so nothing below the
model knows of them: not the mixers' states and caches, not the layouts, not the engines. A packed row grows by that
many tokens a document; rows of a batch with fewer documents than another are filled up with more of them in front,
in a document of their own. Nothing is predicted at a meta token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sisa_dist.config import UserError


class Prefixed(NamedTuple):
    tokens: Tensor  # [B, T + added]
    doc_ids: Tensor | None
    places: Tensor  # [B, T]: where the given tokens stand


def with_meta_tokens(tokens_BT: Tensor, doc_ids_BT: Tensor | None, *, count: int, first_id: int) -> Prefixed:
    """`count` meta tokens, ids first_id …, before every document, or before the row where doc_ids is None."""
    batch, T = tokens_BT.shape
    if doc_ids_BT is None:
        meta = torch.arange(first_id, first_id + count, device=tokens_BT.device, dtype=tokens_BT.dtype)
        index = torch.arange(count, count + T, device=tokens_BT.device).expand(batch, -1)
        return Prefixed(torch.cat((meta.expand(batch, -1), tokens_BT), dim=1), None, index)
    starts = torch.ones_like(doc_ids_BT)
    starts[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    number_BT = starts.cumsum(1)  # of the document, from 1
    # On fake tensors, whose values nobody knows, a row is one document.
    most = 1 if isinstance(number_BT, FakeTensor) else int(number_BT[:, -1].max())
    filling_B1 = count * (most - number_BT[:, -1:])
    index = torch.arange(T, device=tokens_BT.device) + count * number_BT + filling_B1
    total = T + count * most
    given = torch.zeros(batch, total, dtype=torch.bool, device=tokens_BT.device).scatter_(1, index, True)
    place, given_before = torch.arange(total, device=tokens_BT.device), given.cumsum(1) - given.long()
    meta = first_id + (place - given_before) % count
    doc_ids = doc_ids_BT.gather(1, given_before)  # a meta token's is that of the next given token
    doc_ids = torch.where(place < filling_B1, doc_ids_BT[:, :1] - 1, doc_ids)
    return Prefixed(meta.to(tokens_BT.dtype).scatter(1, index, tokens_BT), doc_ids, index)


def refuse_new_documents(doc_ids_BT: Tensor | None, start: int) -> None:
    """Raises UserError where a document begins at or behind `start`: its meta tokens would shift the rows' places."""
    if doc_ids_BT is not None and (doc_ids_BT[:, start:] != doc_ids_BT[:, start - 1 : -1]).any():
        raise UserError("meta tokens: a document begins behind the cache's first chunk: give all prompts in one chunk")


def spread_labels(labels_BT: Tensor, prefixed: Prefixed, *, ignore: int) -> Tensor:
    """The labels at their tokens' new places, `ignore` elsewhere."""
    return labels_BT.new_full(prefixed.tokens.shape, ignore).scatter(1, prefixed.places, labels_BT)


def at_tokens(x: Tensor, prefixed: Prefixed) -> Tensor:
    """[B, T + added, …] → [B, T, …] at the given tokens."""
    index = prefixed.places.view(*prefixed.places.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
