"""Perplexity of held-out text: one sum over tokens, divided once, so that no batch, rank or padding weighs more."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.loader import Batch
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.scorer import IGNORE, Scorer, progress


@dataclass(frozen=True)
class Perplexity:
    loss: float  # nats per token
    perplexity: float  # exp(loss); inf where that is no float
    accuracy: float  # share of tokens that are the argmax
    tokens: int
    bits_per_byte: float | None  # of UTF-8 text, comparable over tokenizers; None: bytes unknown
    bytes: int | None


def perplexity(
    scorer: Scorer,
    batches: Iterable[Batch],
    *,
    tokenizer: Tokenizer | None = None,
    quiet: bool = True,
    total: int | None = None,
) -> Perplexity:
    """Over the labels of `batches` that count (−100 does not). Collective: equally many batches on every rank.

    A tokenizer makes bits per byte known: the bytes are those of the decoded labels. The ends of documents have none,
    but their nats count; a character cut by a window's edge is off by up to three bytes. `total` is for the bar alone.
    Quiet by default: the training loop, which has a bar of its own, calls this too.
    Raises UserError where no label counts on any rank.
    """
    surprise, hits, count, num_bytes = 0.0, 0.0, 0.0, 0.0
    for batch in progress(batches, scorer, what="perplexity", quiet=quiet, total=total):
        log_prob_BT, is_argmax_BT = scorer.score(batch.tokens, batch.labels, batch.doc_ids)
        valid_BT = batch.labels != IGNORE
        surprise -= log_prob_BT.double().sum().item()
        hits += (is_argmax_BT & valid_BT).sum().item()
        count += valid_BT.sum().item()
        if tokenizer is not None:
            num_bytes += _bytes(tokenizer, batch.labels, valid_BT)
    surprise, hits, count, num_bytes = scorer.sum_over_dp([surprise, hits, count, num_bytes])
    if count == 0:
        raise UserError("perplexity: the validation split has no token to score: raise data.validation_fraction")
    loss = surprise / count
    return Perplexity(
        loss=loss,
        perplexity=exp(loss),
        accuracy=hits / count,
        tokens=int(count),
        bits_per_byte=surprise / math.log(2) / num_bytes if num_bytes else None,
        bytes=int(num_bytes) if tokenizer is not None else None,
    )


def exp(nats: float) -> float:
    """e^nats, inf where Python would raise."""
    return math.exp(nats) if not nats > 709.0 else math.inf


def _bytes(tokenizer: Tokenizer, labels_BT: Tensor, valid_BT: Tensor) -> int:
    rows = (labels_T[valid_T].tolist() for labels_T, valid_T in zip(labels_BT, valid_BT, strict=True))
    return sum(len(tokenizer.decode(row).encode("utf-8", errors="replace")) for row in rows)
