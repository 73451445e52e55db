"""Gopher's repetition filters: Rae et al. 2021, section A.1.1 and table A1.

The paper leaves open what of a repeated thing counts. Here, of lines, paragraphs (parted by blank lines) and n-grams of
5 to 10 words, each occurrence but the first is a duplicate; of the most frequent n-gram of 2 to 4 words every
occurrence counts, if there are two. Words are what whitespace separates, characters those of words (of lines and
paragraphs all of theirs); a character in two overlapping n-grams counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.passes.base import Drop
from data_pipeline.sources import Document
from sisa_dist.config.passes import RepetitionConfig

_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Repetition:
    limits: RepetitionConfig
    name: str = "repetition"

    def signature(self, document: Document) -> bytes | Drop:
        for key, fraction in fractions(document.text):
            if fraction > (most := getattr(self.limits, key)):
                return Drop(f"{key} above {most:g}")
        return b""

    def decide(self, scratch: Path, stack: ExitStack) -> Callable[[bytes], Drop | None] | None:
        return None


def fractions(text: str) -> Iterator[tuple[str, float]]:
    """(key of RepetitionConfig, fraction of the text) one after the other, cheap ones first."""
    for what, parts in (("line", text.split("\n")), ("paragraph", _BLANK_LINES.split(text))):
        number, characters = duplicate_parts([stripped for part in parts if (stripped := part.strip())])
        yield f"duplicate_{what}s", number
        yield f"duplicate_{what}_characters", characters
    words = text.split()
    sizes = np.array([len(word) for word in words], np.int64)
    known: dict[str, int] = {}
    word_ids = np.array([known.setdefault(word, len(known)) for word in words], np.int64)
    ids = word_ids
    for n in range(2, 11):
        if len(ids) < 2:
            return
        # An n-gram is an (n-1)-gram and a word: equal ids, equal n-grams, without a hash.
        pairs = ids[:-1] * len(known) + word_ids[n - 1 :]
        _, first, ids, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        if n <= 4:
            yield f"top_{n}gram_characters", _covered(_top(ids, counts, sizes, n), sizes, n)
        else:
            again = np.ones(len(ids), bool)
            again[first] = False
            yield f"duplicate_{n}gram_characters", _covered(again, sizes, n)


def duplicate_parts(parts: Sequence[str]) -> tuple[float, float]:
    """What fraction of `parts`, and of their characters, came before among them."""
    seen: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen:
            number += 1
            characters += len(part)
        seen.add(part)
    return number / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def _top(ids: NDArray[np.int64], counts: NDArray[np.int64], sizes: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
    """Where the most frequent n-gram begins, of equally frequent ones the longest; nowhere where none comes twice."""
    most = counts.max()
    if most == 1:
        return np.zeros(len(ids), bool)
    totals = np.concatenate([[0], np.cumsum(sizes)])
    lengths = np.where(counts[ids] == most, totals[n:] - totals[:-n], -1)
    return ids == ids[np.argmax(lengths)]


def _covered(begins: NDArray[np.bool_], sizes: NDArray[np.int64], n: int) -> float:
    """The fraction of characters in the n words from each of `begins` ([words - n + 1]) on."""
    edges = np.zeros(len(sizes) + 1, np.int64)
    edges[: len(begins)] += begins
    edges[n : n + len(begins)] -= begins
    inside = np.cumsum(edges[:-1]) > 0
    return float(sizes[inside].sum() / sizes.sum())
