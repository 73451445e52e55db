"""Needle in a haystack as the SISA paper coded it: is the value's first token the argmax after the query of its key?

200 prompts of a nominal 512 tokens: one repeated filler sentence, in it one of five fixed key → value sentences, at the
end the key again. Sentences, filler and placement are those of the authors' published evaluation script. Known limits
of that protocol, kept so that the figures compare: five answers only, the needle in the first half and between any two
tokens, no distractor. `placement="uniform"` spreads the needle over the whole filler instead. The draws are ours
(counter-based), so the items are not the authors' one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.scorer import IGNORE, Example, Scorer, encode_continuation, score_examples

FILLER = "The quick brown fox jumps over the lazy dog. "
NEEDLES = (
    ("The secret code is", "ALPHA"),
    ("The password is", "BRAVO"),
    ("The answer is", "CHARLIE"),
    ("The key number is", "DELTA"),
    ("The magic word is", "ECHO"),
)
DEPTH_BINS = 5
_SPARE = 10  # tokens the paper leaves free, so its prompts of context 512 have 502 tokens
_MARGIN = 5  # filler tokens before the earliest needle
_LEAST_FILLER = 10

Placement = Literal["paper", "uniform"]


@dataclass(frozen=True)
class Item:
    """A prompt whose one label is the value's first token, and the needle's depth in the filler, 0 (start) to 1."""

    example: Example
    depth: float


def niah(
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    items: int,
    context: int,
    batch_size: int,
    seed: int = 0,
    placement: Placement = "paper",
    quiet: bool = False,
) -> dict[str, Any]:
    """Accuracy over `items` prompts of `context` − 10 tokens, overall and in five bins of depth. Collective.

    items_by_depth counts each bin; its accuracy is None where that is 0. distinct_answers: different first tokens among
    the five values; with a tokenizer that opens them all alike, fewer than 5, part of the score is a guess.
    """
    made = [make_item(tokenizer, i, context=context, seed=seed, placement=placement) for i in range(items)]
    examples = [item.example for item in made]
    hits, seen = [0.0] * DEPTH_BINS, [0.0] * DEPTH_BINS
    for number, _, is_argmax_T in score_examples(scorer, examples, batch_size=batch_size, what="NIAH", quiet=quiet):
        depth_bin = min(int(made[number].depth * DEPTH_BINS), DEPTH_BINS - 1)
        hits[depth_bin] += float(is_argmax_T[-1])
        seen[depth_bin] += 1
    totals = scorer.sum_over_dp(hits + seen)
    hits, seen = totals[:DEPTH_BINS], totals[DEPTH_BINS:]
    assert sum(seen) == items
    return {
        "accuracy": sum(hits) / items,
        "accuracy_by_depth": [hit / n if n else None for hit, n in zip(hits, seen, strict=True)],
        "items_by_depth": [int(n) for n in seen],
        "items": items,
        "context": context,
        "prompt_tokens": context - _SPARE,
        "placement": placement,
        "distinct_answers": len({_query(tokenizer, *needle)[1] for needle in NEEDLES}),
    }


def make_item(tokenizer: Tokenizer, item: int, *, context: int, seed: int, placement: Placement = "paper") -> Item:
    """Item number `item`: drawn from (seed, item) alone. Raises UserError where `context` has no room."""
    key_words = np.array([seed, item], dtype=np.uint64)  # left to itself NumPy makes floats of a list past 2^63
    generator = np.random.Generator(np.random.Philox(key=key_words))
    key, value = NEEDLES[int(generator.integers(len(NEEDLES)))]
    needle = tokenizer.encode(f"{key} {value}.")
    query, answer = _query(tokenizer, key, value)
    room = context - _SPARE - len(needle) - len(query)
    latest = room // 2 if placement == "paper" else room
    if room < _LEAST_FILLER or latest < _MARGIN:
        least = context - room + max(_LEAST_FILLER, 2 * _MARGIN)
        raise UserError(f"evaluation.niah_context {context} has no room for a needle and filler: set at least {least}")
    before = int(generator.integers(_MARGIN, latest + 1))
    filler = _filler(tokenizer, room)
    # After the needle the filler starts over, as in the paper, rather than going on where it was cut.
    tokens = filler[:before] + needle + filler[: room - before] + query
    return Item(Example(tokens, [IGNORE] * (len(tokens) - 1) + [answer]), before / room)


def _query(tokenizer: Tokenizer, key: str, value: str) -> tuple[list[int], int]:
    """(ids of the key as the prompt ends, the value's first id after them)."""
    ids, start = encode_continuation(tokenizer, f" {key}", f" {value}")
    return ids[:start], ids[start]


def _filler(tokenizer: Tokenizer, length: int) -> list[int]:
    """At least `length` ids of the sentence over and over, encoded as one text."""
    repeats = 1
    while len(ids := tokenizer.encode(FILLER * repeats)) < length:
        repeats *= 2
    return ids
