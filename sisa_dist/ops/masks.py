"""Boolean masks of causal and document-wise attention. Shapes only; no path is chosen here."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """Bool [num_queries, num_keys], True = visible: the queries are the last `num_queries` of `num_keys` positions."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)


def document_mask(doc_ids_BT: Tensor) -> Tensor:
    """Bool [B, 1, T, T], True = visible: not later, and of the same document. Costs T² bytes a sequence."""
    T = doc_ids_BT.shape[-1]
    same_BTT = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
    return (same_BTT & causal_mask(T, T, device=doc_ids_BT.device))[:, None]
