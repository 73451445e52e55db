"""Boolean masks of causal and document-wise attention. Shapes only; no path is chosen here."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """Bool [num_queries, num_keys], True = visible: the queries are the last `num_queries` of `num_keys` positions."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)


def document_mask(doc_ids_BT: Tensor, num_queries: int | None = None) -> Tensor:
    """Bool [B, 1, num_queries, T], True = visible: not later, and of the same document.

    The queries are the last `num_queries` tokens, by default all T: a mask that costs T² bytes a sequence, which only
    the dense oracle and short sequences can afford.
    """
    T = doc_ids_BT.shape[-1]
    rows = T if num_queries is None else num_queries
    same_BrT = doc_ids_BT[:, T - rows :, None] == doc_ids_BT[:, None, :]
    return (same_BrT & causal_mask(rows, T, device=doc_ids_BT.device))[:, None]
