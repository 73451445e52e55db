"""What evaluation needs of an engine, and how a list of examples is dealt to data ranks without a hang.

Nothing here knows a model: an engine, or a table of answers in a test, is a `Scorer`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol, TypeVar

import torch
from rich.progress import track
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer

IGNORE = -100  # a label that does not count

_Item = TypeVar("_Item")


class Scorer(Protocol):
    """`score` is collective: every rank calls it equally often, with batches of any shape."""

    dp_rank: int
    dp_size: int

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(log-probability fp32, is-argmax bool) [B, T] of each label, on the CPU; label −100 gives (0, True)."""

    def sum_over_dp(self, values: list[float]) -> list[float]:
        """float64 sums over data ranks."""


@dataclass(frozen=True)
class Example:
    """Tokens and the label of each position; labels that do not count are −100. Equal lengths."""

    tokens: list[int]
    labels: list[int]


def score_examples(
    scorer: Scorer, examples: Sequence[Example], *, batch_size: int, what: str, quiet: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (example number, log-probability [T], is-argmax [T]) of this rank's share. Collective.

    Examples are sorted by length, so that a batch is little padded, longest first, so that a batch too large for the
    memory fails at once. Every rank makes ⌈examples / (batch_size × dp_size)⌉ calls; one without examples left scores
    a single ignored token. The whole iterator must be consumed on every rank.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].tokens), i))
    per_call = batch_size * scorer.dp_size
    starts = range(0, len(order), per_call)
    for start in progress(starts, scorer, what=what, quiet=quiet, total=len(starts)):
        mine = order[start : start + per_call][scorer.dp_rank :: scorer.dp_size]
        length = max((len(examples[i].tokens) for i in mine), default=1)
        tokens_BT = torch.zeros(max(1, len(mine)), length, dtype=torch.int64)
        labels_BT = torch.full_like(tokens_BT, IGNORE)
        for row, i in enumerate(mine):
            # Padding stands on the right, where causality keeps it from every label that counts.
            tokens_BT[row, : len(examples[i].tokens)] = torch.tensor(examples[i].tokens)
            labels_BT[row, : len(examples[i].labels)] = torch.tensor(examples[i].labels)
        log_prob_BT, is_argmax_BT = scorer.score(tokens_BT, labels_BT)
        for row, i in enumerate(mine):
            size = len(examples[i].tokens)
            yield i, log_prob_BT[row, :size], is_argmax_BT[row, :size]


def progress(
    items: Iterable[_Item], scorer: Scorer, *, what: str, quiet: bool, total: int | None = None
) -> Iterable[_Item]:
    """`items` under a bar: on the first rank only, where there is a terminal, and not when `quiet`."""
    if quiet or scorer.dp_rank or not sys.stdout.isatty():
        return items
    return track(items, description=what, total=total, transient=True)


def encode_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """(ids of context + continuation encoded as one text, number of ids that are context).

    A model sees the whole text's ids, and a SentencePiece model may join characters across the boundary, or add a
    leading space to whatever it encodes. So the context is the longest common prefix of its own ids and the whole's: a
    piece that spans the boundary belongs to the continuation. Where no piece does (GPT-NeoX, or any model that splits
    at spaces) this equals encoding the two apart, as the paper does. At least one id is left to the continuation.
    """
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, alone, strict=False)))
    return whole, min(common, len(whole) - 1)
