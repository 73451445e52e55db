"""Loss by position: what a longer context is worth, and where a model stops being able to use one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from data_pipeline.loader import Batch
from sisa_dist.config import UserError
from sisa_dist.evaluation.scorer import IGNORE, Scorer, progress
from sisa_dist.ops.documents import tokens_seen


def loss_by_position(
    scorer: Scorer, batches: Iterable[Batch], *, seq_len: int, buckets: int, quiet: bool = True
) -> dict[str, Any]:
    """Mean loss in nats per token over all labels that count, and in each of `buckets` stretches of the window.

    A label's position is that of the token it follows, in its document where documents do not see each other. from:
    the first position of each bucket; loss_by_position: None where no label counts. Weighted by tokens_by_position
    they make the loss. Collective: equally many batches of `seq_len` tokens on every rank.
    Raises UserError where no label counts on any rank.
    """
    surprise_P = torch.zeros(seq_len, dtype=torch.float64)
    count_P = torch.zeros(seq_len, dtype=torch.float64)
    for batch in progress(batches, scorer, what="loss by position", quiet=quiet):
        log_prob_BT, _ = scorer.score(batch.tokens, batch.labels, batch.doc_ids)
        position_BT = tokens_seen(batch.doc_ids, seq_len, start=0, device=batch.tokens.device) - 1
        valid_BT = batch.labels != IGNORE
        position_N = position_BT.expand_as(batch.labels)[valid_BT]
        surprise_P.index_add_(0, position_N, -log_prob_BT[valid_BT].double())
        count_P.index_add_(0, position_N, torch.ones_like(position_N, dtype=torch.float64))
    starts = [bucket * seq_len // buckets for bucket in range(buckets)]
    bounds = list(zip(starts, [*starts[1:], seq_len], strict=True))
    sums = [float(values_P[start:stop].sum()) for values_P in (surprise_P, count_P) for start, stop in bounds]
    sums = scorer.sum_over_dp(sums)
    surprise, count = sums[:buckets], sums[buckets:]
    if not sum(count):
        raise UserError("loss by position: the validation split has no token to score: raise data.validation_fraction")
    return {
        "loss": sum(surprise) / sum(count),
        "tokens": int(sum(count)),
        "seq_len": seq_len,
        "from": starts,
        "loss_by_position": [nats / n if n else None for nats, n in zip(surprise, count, strict=True)],
        "tokens_by_position": [int(n) for n in count],
    }
