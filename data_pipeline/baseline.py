"""The baseline a model must beat: predicting every held-out token by how often it stands in the training text."""

from __future__ import annotations

import math

import numpy as np

from data_pipeline.index import Index


def unigram_perplexity(train: Index, validation: Index, *, max_tokens: int | None = None) -> float:
    """exp of the mean −log p over the validation split's targets (all tokens but the first; at most max_tokens).

    p is the add-one smoothed frequency over the vocabulary, from the training split alone.
    """
    counts = np.ones(train.vocab_size, dtype=np.float64)
    for member in range(len(train.tokens)):
        counts += np.bincount(train.read_member(member), minlength=train.vocab_size)
    surprise = -np.log(counts / counts.sum())
    targets = np.concatenate([validation.read_member(member) for member in range(len(validation.tokens))])[1:]
    return math.exp(float(surprise[targets[:max_tokens]].mean()))
