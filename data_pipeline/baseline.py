"""The baseline a model must beat: predicting every held-out token by how often it stands in the training text."""

from __future__ import annotations

import math

import numpy as np

from data_pipeline.index import Index


def unigram_perplexity(
    train: Index, validation: Index, *, max_tokens: int | None = None, document_mask: bool = False
) -> float:
    """exp of the mean −log p over the targets that `validation_batches` serves, without the model.

    p is the add-one smoothed frequency over the vocabulary, from the training split alone. The targets are all tokens
    but the first, at most `max_tokens` (windows × seq_len); with `document_mask` not those that open a document.
    """
    counts = train.token_counts + 1.0
    surprise = -np.log(counts / counts.sum())
    total, number, left = 0.0, 0, math.inf if max_tokens is None else max_tokens
    for member in range(len(validation.members)):
        ids = validation.read_member(member)
        is_target = np.ones(len(ids), dtype=bool)
        if document_mask:
            opens = np.cumsum(validation.segments(member))[:-1]
            is_target[opens] = False
            is_target[0] = validation.members["continued"][member]
        if member == 0:
            ids, is_target = ids[1:], is_target[1:]
        ids, is_target = ids[: int(min(left, len(ids)))], is_target[: int(min(left, len(ids)))]
        left -= len(ids)
        total += float(surprise[ids[is_target]].sum())
        number += int(is_target.sum())
    return math.exp(total / number)
