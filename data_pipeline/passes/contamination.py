"""Documents that hold part of an evaluation text: 13 words in a row, as Brown et al. 2020 (GPT-3), appendix C, tell it.

An evaluation text of 8 to 12 words is told by all of them in a row, a shorter one by nothing: how many are too short
is said in a warning. The whole document goes; one sentence quoted in a book costs the book, which `min_matches` can
soften.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.passes.base import Drop
from data_pipeline.passes.words import ngram_hashes, word_hashes
from data_pipeline.sources import Corpus, Document, list_files
from sisa_dist.config import UserError
from sisa_dist.config.passes import DecontaminateConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Decontaminate:
    """`known`: by file name, by n, the sorted hashes of its n-grams."""

    min_matches: int
    known: dict[str, dict[int, NDArray[np.uint64]]]
    name: str = "decontaminate"

    @classmethod
    def of(cls, settings: DecontaminateConfig, files: Sequence[str]) -> Decontaminate:
        """Reads the evaluation `files` (.txt, .jsonl, .tar). Raises UserError where one cannot be or tells nothing."""
        return cls(
            settings.min_matches, {file.path.name: _ngrams(str(file.path), settings) for file in list_files([*files])}
        )

    def signature(self, document: Document) -> bytes | Drop:
        words = word_hashes(document.text)
        of_document: dict[int, NDArray[np.uint64]] = {}
        for name, by_length in self.known.items():
            matches = 0
            for n, hashes in by_length.items():
                if n not in of_document:
                    of_document[n] = np.unique(ngram_hashes(words, n))
                matches += _common(of_document[n], hashes)
            if matches >= self.min_matches:
                return Drop(f"holds part of {name}")
        return b""

    def decide(self, scratch: Path, stack: ExitStack) -> Callable[[bytes], Drop | None] | None:
        return None


def _ngrams(path: str, settings: DecontaminateConfig) -> dict[int, NDArray[np.uint64]]:
    found: dict[int, list[NDArray[np.uint64]]] = {}
    short = number = 0
    for text in Corpus(path, settings.text_key):
        words = word_hashes(text.text)
        n = min(len(words), settings.ngram)
        number += 1
        if n < settings.min_ngram:
            short += 1
        else:
            found.setdefault(n, []).append(ngram_hashes(words, n))
    if short == number:
        raise UserError(
            f"data.passes.decontaminate: {path}: no text has {settings.min_ngram} words: set min_ngram lower, or leave "
            "the file out"
        )
    if short:
        _log.warning(
            "%s: %d of %d texts have fewer than %d words and cannot be looked for", path, short, number,
            settings.min_ngram,
        )  # fmt: skip
    return {n: np.unique(np.concatenate(hashes)) for n, hashes in sorted(found.items(), reverse=True)}


def _common(ones: NDArray[np.uint64], others: NDArray[np.uint64]) -> int:
    """How many of the sorted `ones` are among the sorted `others`: the fewer are looked up among the more."""
    few, many = sorted((ones, others), key=len)
    if len(few) == 0:
        return 0
    places = np.minimum(np.searchsorted(many, few), len(many) - 1)
    return int(np.count_nonzero(many[places] == few))
